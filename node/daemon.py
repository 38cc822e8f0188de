"""The node: joins a swarm, gets and verifies what it is to hold, serves it, and leaves without a trace.

Order of leaving: accept nothing new, withdraw the announcement, finish what was begun, close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3

from moehive.protocol import limits
from moehive.protocol.ids import ModelId, is_hash
from moehive.protocol.manifest import Manifest
from moehive.protocol.ticket import Ticket
from moehive.swarm.announcer import Announcer
from moehive.swarm.identity import Identity
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member, is_genuine
from moehive.swarm.model_fetcher import ModelFetcher
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.hivemind import HivemindTransport

from .holdings import Holdings
from .http.node_app import node_http
from .notify import tell_systemd
from .own_port import is_free, own_http_port, own_port
from .serving import Serving
from .settings import DEFAULT_LISTEN, NodeReady, NodeSettings
from .state import NodeState

_log = get_logger(__name__)
_JOIN_TIMEOUT = 60.0  # seconds to find a peer with the model, when it has to be fetched


class NodeDaemon:
    """One node. `run(stop)` serves until `stop` is set; `on_ready` is called once everything is announced."""

    def __init__(self, settings: NodeSettings, on_ready: Callable[[NodeReady], None]) -> None:
        self._settings = settings
        self._on_ready = on_ready

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then leave. Raises CallerError, LocalError, PeerUnreachable at the start."""
        settings = self._settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        identity = Identity.load_or_create(settings.identity) if settings.identity else Identity.ephemeral()
        secret = settings.join.secret if settings.join else founders_secret(identity)
        state = NodeState(tell_systemd)
        async with AsyncExitStack() as stack:
            own = own_http_port(identity) if settings.identity else 0  # a key that is not kept has no lasting port
            await stack.enter_async_context(node_http(settings.http, own, state))  # first: it also says what takes long
            transport = await stack.enter_async_context(_transport(settings, identity))
            member = await stack.enter_async_context(Member(transport, secret))
            source, manifest = await self._open_model(member)
            announcer = Announcer(transport, identity, secret, manifest.model_id)
            serving = Serving(settings, member, manifest, source, announcer, state)
            await serving.run(stop, partial(self._ready, member, serving.holdings, state.http))

    def _ready(self, member: Member, holdings: Holdings, http: str | None) -> None:
        settings, manifest = self._settings, holdings.manifest
        addresses = tuple(member.transport.addresses)
        others = settings.join.peers if settings.join else ()
        self._on_ready(
            NodeReady(
                peer=member.transport.peer,
                model=manifest.model_id,
                model_name=manifest.model.name,
                held=len(holdings.experts),
                experts=len(manifest.experts),
                held_bytes=holdings.expert_bytes,
                supplied_bytes=holdings.supplied_bytes,
                skeleton=holdings.skeleton,
                addresses=addresses,
                ticket=Ticket(member.secret, (*addresses, *others)[: limits.MAX_TICKET_PEERS]),
                http=http,
            )
        )

    async def _open_model(self, member: Member) -> tuple[ObjectSource, Manifest]:
        """The local directory, or the store that fetched objects go into."""
        settings = self._settings
        if not is_hash(settings.model):
            directory = await asyncio.to_thread(ConvertedDirectory, Path(settings.model))
            return directory, directory.manifest
        store = ContentStore(settings.store, settings.disk)
        await asyncio.to_thread(store.sweep)
        fetcher = ModelFetcher(member, store, settings.seeds)
        return store, await fetcher.manifest(ModelId(settings.model), timeout=_JOIN_TIMEOUT)


def founders_secret(identity: Identity) -> bytes:
    """The secret of the swarm that a node founds: one for each identity, so that its tickets survive a restart."""
    return blake3(identity.seed, derive_key_context="moehive 2026 swarm secret of a founder").digest()


def _listen(settings: NodeSettings, identity: Identity) -> tuple[str, ...]:
    """Where to listen: as told, or at a loopback port that stays the same while the key does."""
    if settings.listen != (DEFAULT_LISTEN,) or settings.identity is None:
        return settings.listen
    port = own_port(identity)
    if is_free(port):
        return (f"/ip4/127.0.0.1/tcp/{port}",)
    _log.warning("this node's own port is in use: earlier tickets do not lead to it now", port=port)
    return settings.listen


def _transport(settings: NodeSettings, identity: Identity) -> HivemindTransport:
    return HivemindTransport(
        identity,
        listen=_listen(settings, identity),
        announce=settings.announce,
        bootstrap=settings.join.peers if settings.join else (),
        record_validator=is_genuine,
    )
