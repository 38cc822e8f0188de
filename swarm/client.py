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
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, get_args

from anyio.from_thread import BlockingPortal, start_blocking_portal

from moehive.protocol.errors import ConfigError, CorruptShard
from moehive.protocol.ids import ExpertKey, ModelId, PeerId, is_hash, parse_model_id
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.protocol.ticket import Ticket

from .directory import Holders
from .dispatch.caller import CallSettings
from .dispatch.spot_checks import CheckCounts, LiarReport
from .dispatch.stats import DispatchStats
from .dispatch.swarm_model import SwarmModel
from .identity import Identity
from .member import Member, is_genuine
from .model_fetcher import ModelFetcher
from .paths import Paths
from .seeds.base import SeedName, parse_seed
from .skeleton import lay_out_skeleton
from .store.content import ContentStore
from .tasks import check_not_forked
from .transfer.progress import Observer
from .transport.base import Transport

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .model.kv.options import KvMode, KvOptions
    from .tiers.stats import TierStats

AnswerForm = Literal["sum", "rows"]
DEFAULT_DISK_BUDGET = 64 << 30  # bytes for the dense parts of models; a client keeps no experts
_NOT_JOINED = "the swarm is not joined: use `with join(ticket) as swarm:`"


def join(
    ticket: str | Ticket,
    *,
    cache: Path | str | None = None,
    disk: int = DEFAULT_DISK_BUDGET,
    seeds: Sequence[str] = (),
    settings: CallSettings | None = None,
) -> Swarm:
    """A client of the swarm that `ticket` admits to; use it as a context manager.

    `cache` is where dense parts and tokenizers are kept (default: the user's cache directory), `disk` its budget in
    bytes. `seeds` stand in for peers that are missing: converted directories, or the checkpoints that models were
    converted from, as directories or as "hub:REPO@REVISION". Raises TicketError, ConfigError; entering raises
    PeerUnreachable when no peer of the ticket answers, TransportError.
    """
    if isinstance(seeds, str):  # a sequence, too: of its characters
        raise ConfigError(f"seeds={seeds!r} is one name; write seeds=[{seeds!r}]")
    if disk < 0:
        raise ConfigError(f"disk={disk} is no budget; give a number of bytes from 0 up")
    parsed = ticket if isinstance(ticket, Ticket) else Ticket.parse(ticket)
    paths = Paths.of(os.environ)
    if cache is not None:
        paths = Paths(paths.config, paths.data, Path(cache))
    return Swarm(parsed, paths, disk, settings or CallSettings(), [parse_seed(text) for text in seeds])


class Swarm:
    """A joined swarm. Made by `join`; a context manager. Methods may be called from any thread."""

    def __init__(
        self, ticket: Ticket, paths: Paths, disk: int, settings: CallSettings, seeds: Sequence[SeedName] = ()
    ) -> None:
        self._ticket = ticket
        self._paths = paths
        self._settings = settings
        self._store = ContentStore(paths.store, disk)
        self._seeds = seeds
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self._member: Member | None = None
        self._fetcher: ModelFetcher | None = None
        self._models: dict[ModelId, SwarmModel] = {}
        self._process = 0  # that joined

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal("asyncio"))
            member = stack.enter_context(portal.wrap_async_context_manager(membership(self._ticket)))
            self._stack = stack.pop_all()
        self._portal, self._member, self._models, self._process = portal, member, {}, os.getpid()
        self._fetcher = ModelFetcher(member, self._store, self._seeds, several=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process != os.getpid():
            return  # a fork has no thread that could leave; what it refers to must stay, or it would be closed
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            self._portal = self._member = self._fetcher = None

    # --- models ---------------------------------------------------------------------------------------------------

    def load(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype | None = None,
        answers: AnswerForm = "sum",
        ram: int = 0,
        device: torch.device | str | None = None,
        vram: int | None = None,
        expect_tokens: int | None = None,
        kv: KvMode | KvOptions = "full",
        timeout: float = 60.0,
        observer: Observer | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """A transformers model whose routed experts are computed by the swarm, and its tokenizer.

        `model` is a model id, or a local converted directory whose dense part is then used. `answers`: "sum" (one row
        per token comes back from each peer: fast) or "rows" (every expert's row comes back and is added in the order of
        transformers: equal to it bit for bit on like machines, more bytes). Experts are never replaced or left out.
        `kv`: how `generate` keeps keys and values, for contexts that do not fit into memory; see KvOptions.

        With `ram`, a budget in bytes, experts that are worth it are fetched in the background and then computed here;
        the budget is the same for all loads of one model. What is worth it depends on how many tokens will be computed:
        `generate` says so for each call; `expect_tokens` is for who knows of more, that of all calls, prompts included.

        `device` is where the model computes, by default the processor. Experts that are kept here are then kept in its
        memory, too, once they were used, in `vram` bytes, by default what is free there.

        Waits up to `timeout` seconds for a peer that has the model. Raises ModelUnavailable, ShardUnavailable,
        ManifestError, StorageError, TransportError, BudgetTooSmall; ConfigError for a `model` that is neither, for a
        `device` that is not here, for `vram` without `ram` and `device`, for another `ram`, `device` or `vram` than
        before, or when not joined.
        """
        from .loading import open_local
        from .model.device import accelerator_for

        if answers not in get_args(AnswerForm):
            raise ConfigError(f"answers={answers!r} is not known; choose one of {', '.join(get_args(AnswerForm))}")
        if vram is not None and not ram:
            raise ConfigError("vram is for experts that are kept here: give ram, too")
        accelerator = accelerator_for(device, vram)
        directory, manifest = self._skeleton(model, timeout, observer)
        opened = self._open_portal.call(self._open_model, manifest, ram)
        if device is not None:
            opened.check_device(accelerator, vram)
        if opened.resident is not None and expect_tokens is not None:
            opened.resident.expect(expect_tokens)
        backend = opened.backend(answers)
        loaded, tokenizer = open_local(directory, dtype=dtype, backend=backend, device=device, kv=kv)
        if opened.resident is not None:
            from .model.horizon import tell_horizon

            tell_horizon(loaded, opened.resident.generating)
            if accelerator is not None:
                opened.keep_on(accelerator, loaded.dtype, vram)
        return loaded, tokenizer

    def load_expert(
        self, model_id: str, layer: int, expert: int, *, dtype: torch.dtype | None = None, timeout: float = 10.0
    ) -> dict[str, Tensor]:
        """One routed expert's tensors by their names in the checkpoint, verified: from the store where it was fetched
        before, otherwise from peers and seeds straight into memory, ahead of every other download.

        `dtype` as in `moehive.swarm.load_expert`. All of it takes at most `timeout` seconds. Raises ModelUnavailable,
        ShardUnavailable, ManifestError, StorageError, TransportError; ConfigError for what is no model id, for an
        expert that the model does not have, or when not joined.
        """
        from .loading import converted, expert_shard
        from .model.reading import read_tensors, tensor_table
        from .model.tensors import empty_bytes, first_offset, tensors_of

        deadline = time.monotonic() + timeout
        model = parse_model_id(model_id)
        manifest = self._open_portal.call(partial(self._model_fetcher.manifest, model, timeout=timeout))
        shard = expert_shard(manifest, layer, expert, dtype)
        if self._store.has(shard.hash):
            with (
                suppress(CorruptShard),
                self._store.keeping.use([shard.hash]),
            ):  # corrupt: fetched anew
                return converted(read_tensors(self._store, manifest, shard), dtype)
        table = tensor_table(manifest, shard)
        buffer = empty_bytes(shard.size, first_offset(table))
        left = deadline - time.monotonic()
        self._open_portal.call(self._fetch_to_memory, manifest, shard, buffer.numpy().data, left)
        return converted(tensors_of(buffer, table), dtype)

    def stats(self, model_id: str) -> DispatchStats:
        """Who computed how much for this client so far, of a model that was loaded."""
        return self._loaded(model_id).caller.stats

    def tier_stats(self, model_id: str) -> TierStats | None:
        """What the memory for experts has counted, of a model that was loaded with `ram`; None without."""
        resident = self._loaded(model_id).resident
        return None if resident is None else resident.tier_stats

    def device_stats(self, model_id: str) -> TierStats | None:
        """The same of a device's memory, of a model that was loaded with `ram` and `device`; None without."""
        resident = self._loaded(model_id).resident
        return None if resident is None else resident.device_stats

    def missing(self, model_id: str) -> int:
        """How many experts of a model that was loaded no peer announces now: tokens that need one of them wait until
        somebody does, or fail with ExpertUnavailable.
        """
        return self._loaded(model_id).missing()

    def liars(self, model_id: str) -> Sequence[LiarReport]:
        """Peers that were shown to have computed wrongly, with the forward passes that used their answers."""
        return tuple(self._loaded(model_id).caller.checks.liars)

    def check_counts(self, model_id: str) -> CheckCounts:
        """How many answers were checked so far, and how many should have been and were not, and why."""
        return replace(self._loaded(model_id).caller.checks.counts)

    def holders(self, model_id: str) -> Mapping[PeerId, int]:
        """The peers that announce a model now, and how many experts each. Raises ModelUnavailable after 10 seconds;
        ConfigError for what is no model id, or when not joined.
        """
        return {peer: len(inventory.held) for peer, inventory in self._known_holders(model_id).inventories.items()}

    def coverage(self, model_id: str) -> Mapping[ExpertKey, tuple[PeerId, ...]]:
        """The peers that announce each expert now; one that nobody announces is absent. Raises as `holders`."""
        return self._known_holders(model_id).by_expert

    # --- parts ----------------------------------------------------------------------------------------------------

    def _known_holders(self, model_id: str) -> Holders:
        member, model = self._joined, parse_model_id(model_id)
        return self._open_portal.call(partial(member.wait_for_peers, model, timeout=10.0)).holders

    @property
    def _open_portal(self) -> BlockingPortal:
        if self._portal is None:
            raise ConfigError(_NOT_JOINED)
        check_not_forked(self._process)
        return self._portal

    @property
    def _joined(self) -> Member:
        if self._member is None:
            raise ConfigError(_NOT_JOINED)
        return self._member

    @property
    def _model_fetcher(self) -> ModelFetcher:
        if self._fetcher is None:
            raise ConfigError(_NOT_JOINED)
        return self._fetcher

    async def _fetch_to_memory(self, manifest: Manifest, shard: ShardEntry, buffer: memoryview, seconds: float) -> None:
        member = self._joined
        wanted = member.wanted(member.directory(manifest.model_id), shard)
        await member.downloads.fetch_to_memory(wanted, buffer, deadline=seconds)

    def _skeleton(self, model: str | Path, timeout: float, observer: Observer | None) -> tuple[Path, Manifest]:
        from .store.directory import ConvertedDirectory

        if not is_hash(str(model)):
            if not Path(model).is_dir():
                raise ConfigError(f"{model} is neither a model id (64 hexadecimal digits) nor a converted directory")
            return Path(model), ConvertedDirectory(Path(model)).manifest
        portal, fetcher = self._open_portal, self._model_fetcher
        manifest = portal.call(partial(fetcher.manifest, ModelId(str(model)), timeout=timeout))
        with self._store.keeping.use([shard.hash for shard in manifest.skeleton]):
            portal.call(partial(fetcher.skeleton, manifest, timeout=timeout, observer=observer))
            directory = lay_out_skeleton(manifest, self._store, self._paths.skeleton(manifest.model_id))
        return directory, manifest

    def _loaded(self, model_id: str) -> SwarmModel:
        if self._member is None:
            raise ConfigError(_NOT_JOINED)
        model = self._models.get(ModelId(model_id))
        if model is None:
            raise ConfigError(f"model {model_id} is not loaded: swarm.load(model_id) first")
        return model

    async def _open_model(self, manifest: Manifest, ram: int) -> SwarmModel:
        """On the event loop, where two threads that ask at once get the same one."""
        model = self._models.get(manifest.model_id)
        if model is None:
            model = SwarmModel(manifest, self._joined, self._store, self._settings, ram=ram)
            self._joined.start(model.run(), name="model")
            self._models[manifest.model_id] = model
        elif ram and ram != model.ram:
            raise ConfigError(
                f"{manifest.model.name} is loaded with ram={model.ram} already, not {ram}: all loads of a model in one "
                "swarm share that budget; leave ram out, or join anew"
            )
        return model


@asynccontextmanager
async def membership(ticket: Ticket) -> AsyncIterator[Member]:
    """A member of a ticket's swarm that listens nowhere. Raises PeerUnreachable, TransportError."""
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
