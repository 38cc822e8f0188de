"""The Python client: join a swarm, load a model whose experts stay with the peers, generate.

    from moehive.swarm import join

    with join(ticket) as swarm:
        model, tokenizer = swarm.load(model_id)
        print(tokenizer.decode(model.generate(**tokenizer("...", return_tensors="pt"))[0]))

Everything that talks to peers runs on one event loop in one thread of its own, so this works in scripts, threads and
notebooks alike. The model is a plain transformers model; only its routed experts are computed elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ModelId, PeerId, is_hash
from moehive.protocol.manifest import Manifest
from moehive.protocol.ticket import Ticket

from .dispatch.backend import SwarmExperts
from .dispatch.caller import CallSettings, ExpertCaller
from .dispatch.stats import DispatchStats
from .fetch import Progress
from .identity import Identity
from .member import Member, is_genuine
from .paths import Paths
from .skeleton import lay_out_skeleton
from .store.content import ContentStore
from .transport.base import Transport

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .model.kv.options import KvMode, KvOptions

AnswerForm = Literal["sum", "rows"]
DEFAULT_DISK_BUDGET = 64 << 30  # bytes for the dense parts of models; a client keeps no experts
_NOT_JOINED = "the swarm is not joined: use `with join(ticket) as swarm:`"


def join(
    ticket: str | Ticket,
    *,
    cache: Path | str | None = None,
    disk: int = DEFAULT_DISK_BUDGET,
    settings: CallSettings | None = None,
) -> Swarm:
    """A client of the swarm that `ticket` admits to; use it as a context manager.

    `cache` is where dense parts and tokenizers are kept (default: the user's cache directory), `disk` its budget in
    bytes. Raises TicketError; entering raises PeerUnreachable when no peer of the ticket answers, TransportError.
    """
    parsed = ticket if isinstance(ticket, Ticket) else Ticket.parse(ticket)
    paths = Paths.of(os.environ)
    if cache is not None:
        paths = Paths(paths.config, paths.data, Path(cache))
    return Swarm(parsed, paths, disk, settings or CallSettings())


class Swarm:
    """A joined swarm. Made by `join`; a context manager. Methods may be called from any thread."""

    def __init__(self, ticket: Ticket, paths: Paths, disk: int, settings: CallSettings) -> None:
        self._ticket = ticket
        self._paths = paths
        self._settings = settings
        self._store = ContentStore(paths.store, disk)
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self._member: Member | None = None
        self._callers: dict[ModelId, ExpertCaller] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal("asyncio"))
            member = stack.enter_context(portal.wrap_async_context_manager(_membership(self._ticket)))
            self._stack = stack.pop_all()
        self._portal, self._member, self._callers = portal, member, {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        self._portal = self._member = None

    # --- models ---------------------------------------------------------------------------------------------------

    def load(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype | None = None,
        answers: AnswerForm = "sum",
        kv: KvMode | KvOptions = "full",
        timeout: float = 60.0,
        progress: Progress | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """A transformers model whose routed experts are computed by the swarm, and its tokenizer.

        `model` is a model id, or a local converted directory whose dense part is then used. `answers`: "sum" (one row
        per token comes back from each peer: fast) or "rows" (every expert's row comes back and is added in the order of
        transformers: equal to it bit for bit on like machines, more bytes). Experts are never replaced or left out.
        `kv`: how `generate` keeps keys and values, for contexts that do not fit into memory; see KvOptions.

        Waits up to `timeout` seconds for a peer that has the model. Raises ModelUnavailable, ShardUnavailable,
        ManifestError, StorageError, TransportError; ConfigError for a `model` that is neither, or when not joined.
        """
        from .loading import open_local

        directory, manifest = self._skeleton(model, timeout, progress)
        backend = SwarmExperts(
            self._caller(manifest.model_id), self._open_portal.start_task_soon, manifest.model.num_experts, form=answers
        )
        return open_local(directory, dtype=dtype, backend=backend, kv=kv)

    def stats(self, model_id: str) -> DispatchStats:
        """Who computed how much for this client so far."""
        return self._caller(ModelId(model_id)).stats

    def holders(self, model_id: str) -> Mapping[PeerId, int]:
        """The peers that announce a model now, and how many experts each. Raises ModelUnavailable after 10 seconds."""
        member = self._joined
        directory = self._open_portal.call(partial(member.wait_for_peers, ModelId(model_id), timeout=10.0))
        return {peer: len(inventory.held) for peer, inventory in directory.holders.inventories.items()}

    # --- parts ----------------------------------------------------------------------------------------------------

    @property
    def _open_portal(self) -> BlockingPortal:
        if self._portal is None:
            raise ConfigError(_NOT_JOINED)
        return self._portal

    @property
    def _joined(self) -> Member:
        if self._member is None:
            raise ConfigError(_NOT_JOINED)
        return self._member

    def _skeleton(self, model: str | Path, timeout: float, progress: Progress | None) -> tuple[Path, Manifest]:
        from .store.directory import ConvertedDirectory

        if not is_hash(str(model)):
            if not Path(model).is_dir():
                raise ConfigError(f"{model} is neither a model id (64 hexadecimal digits) nor a converted directory")
            return Path(model), ConvertedDirectory(Path(model)).manifest
        fetch = partial(self._fetch_skeleton, ModelId(str(model)), timeout, progress)
        manifest = self._open_portal.call(fetch)
        return lay_out_skeleton(manifest, self._store, self._paths.skeleton(manifest.model_id)), manifest

    async def _fetch_skeleton(self, model: ModelId, timeout: float, progress: Progress | None) -> Manifest:
        manifest = await self._joined.fetch_manifest(model, self._store, timeout=timeout)
        await self._joined.fetch_skeleton(manifest, self._store, timeout=timeout, progress=progress)
        return manifest

    def _caller(self, model: ModelId) -> ExpertCaller:
        if model in self._callers:
            return self._callers[model]
        return self._open_portal.call(self._make_caller, model)

    async def _make_caller(self, model: ModelId) -> ExpertCaller:
        """On the event loop, where two threads that ask at once get the same one."""
        if model not in self._callers:
            member = self._joined
            self._callers[model] = ExpertCaller(
                model, member.directory(model), member.experts, member.standings, self._settings
            )
        return self._callers[model]


@asynccontextmanager
async def _membership(ticket: Ticket) -> AsyncIterator[Member]:
    async with _client_transport(ticket) as transport, Member(transport, ticket.secret) as member:
        yield member


def _client_transport(ticket: Ticket) -> Transport:
    from .transport.hivemind import HivemindTransport

    # A client listens nowhere and needs no lasting name: a new key for every session.
    return HivemindTransport(
        Identity.ephemeral(),
        bootstrap=ticket.peers,
        client_only=True,
        record_validator=is_genuine,
    )
