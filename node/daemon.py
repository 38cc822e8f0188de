"""The node: joins a swarm, gets and verifies what it is to hold, serves it, and leaves without a trace.

Order of leaving: accept nothing new, withdraw the announcement, finish what was begun, close.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from operator import attrgetter
from pathlib import Path

import structlog
import torch
from blake3 import blake3

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.protocol.errors import CorruptShard
from moehive.protocol.ids import ExpertKey, ModelId, is_hash
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.protocol.messages import EXPERT, PEER, SHARD
from moehive.protocol.ticket import Ticket
from moehive.swarm.announcer import Announcer
from moehive.swarm.fetch import Fetcher
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member, is_genuine
from moehive.swarm.memory import default_ram_budget
from moehive.swarm.model.backend import ExpertLoader, weights_tier
from moehive.swarm.policy.placement import fill_budget
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tasks import task_group
from moehive.swarm.transport.hivemind import HivemindTransport

from .holdings import Holdings
from .selection import AUTO, parse_selection
from .services import ExpertService, PeerService, ShardService
from .settings import NodeReady, NodeSettings
from .worker import ComputeWorker

_log = structlog.get_logger(__name__)
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
        async with AsyncExitStack() as stack:
            transport = await stack.enter_async_context(_transport(settings, identity))
            member = await stack.enter_async_context(Member(transport, secret))
            source, manifest = await self._open_model(member)
            announcer = Announcer(transport, identity, secret, manifest.model_id)
            serving = _Serving(settings, member, manifest, source, announcer)
            await serving.run(stop, partial(self._ready, member, serving))

    def _ready(self, member: Member, serving: _Serving) -> None:
        settings, manifest, holdings = self._settings, serving.holdings.manifest, serving.holdings
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
                skeleton=holdings.skeleton,
                addresses=addresses,
                ticket=Ticket(member.secret, (*addresses, *others)[:16]),
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
        return store, await member.fetch_manifest(ModelId(settings.model), store, timeout=_JOIN_TIMEOUT)


def founders_secret(identity: Identity) -> bytes:
    """The secret of the swarm that a node founds: one for each identity, so that its tickets survive a restart."""
    return blake3(identity.seed, derive_key_context="moehive 2026 swarm secret of a founder").digest()


def _transport(settings: NodeSettings, identity: Identity) -> HivemindTransport:
    return HivemindTransport(
        identity,
        listen=settings.listen,
        announce=settings.announce,
        bootstrap=settings.join.peers if settings.join else (),
        record_validator=is_genuine,
    )


class _Serving:
    """What a node does once it has joined and knows its model."""

    def __init__(
        self, settings: NodeSettings, member: Member, manifest: Manifest, source: ObjectSource, announcer: Announcer
    ) -> None:
        self._settings = settings
        self._member = member
        self._source = source
        self._announcer = announcer
        self.holdings = Holdings(manifest, source, on_change=self._claim)
        self._loader = ExpertLoader(manifest, source)
        self._ram_budget = settings.ram if settings.ram is not None else default_ram_budget()
        self._tier = weights_tier(self._ram_budget)
        self._worker = ComputeWorker(self._lease, self._loader.spec, settings.queue)
        self._experts = ExpertService(self.holdings, self._worker)
        self._shards = ShardService(self.holdings)
        self._peers = PeerService(self.holdings, self._worker, self._shards, lambda: announcer.record().value)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Hold, serve, announce; leave when `stop` is set."""
        async with task_group() as tasks:
            background = [tasks.create_task(self._worker.run(), name="compute")]
            preparing = tasks.create_task(self._prepare(), name="prepare")
            stopping = tasks.create_task(stop.wait(), name="stop")
            await asyncio.wait((preparing, stopping), return_when=asyncio.FIRST_COMPLETED)
            if preparing.done() and not preparing.cancelled() and preparing.exception() is None:
                await self._announcer.announce()
                background.append(tasks.create_task(self._announcer.run(), name="announce"))
                on_ready()
                await stopping
            preparing.cancel()
            await self._leave()
            for task in background:
                task.cancel()

    # --- holding --------------------------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Serve from the start; hold what the settings say, from the local directory or fetched."""
        await self._serve()
        wanted = await self._select()
        manifest = self.holdings.manifest
        shards = [manifest.experts[key] for key in sorted(wanted)]
        if self._settings.skeleton:
            shards += manifest.skeleton
        here = [shard for shard in shards if self._source.path(shard.hash) is not None]
        await asyncio.to_thread(self.holdings.verify, here)
        if isinstance(self._source, ContentStore):
            await self._fetch([shard for shard in shards if shard not in here], self._source)

    async def _select(self) -> frozenset[ExpertKey]:
        manifest, spec = self.holdings.manifest, self._settings.experts
        if spec != AUTO:
            return parse_selection(spec, manifest.model)
        directory = self._member.directory(manifest.model_id)
        await directory.refresh()
        budget = self._ram_budget
        if isinstance(self._source, ContentStore):
            budget = min(budget, self._settings.disk)
        return fill_budget(
            {key: shard.size for key, shard in manifest.experts.items() if shard.group is None},
            directory.holders.replicas,
            budget=budget,
            seed=self._member.transport.peer,
        )

    async def _fetch(self, shards: list[ShardEntry], store: ContentStore) -> None:
        directory = self._member.directory(self.holdings.manifest.model_id)
        fetcher = Fetcher(self._member.shards, self._member.standings, store)
        for number, shard in enumerate(shards, start=1):
            sources = partial(self._member.sources, directory, shard)
            await fetcher.fetch(shard.hash, sources, name=shard.file)
            self.holdings.add(shard)
            _log.info("shard fetched", file=shard.file, number=number, of=len(shards))

    def _claim(self) -> None:
        self._announcer.hold(self.holdings.experts, skeleton=self.holdings.skeleton)

    def _lease(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
        key = ExpertKey(layer, expert)
        load, hint = partial(self._load, key, dtype), self._loader.nbytes(dtype)
        return self._tier.lease((key, dtype), load, attrgetter("nbytes"), size_hint=hint)

    def _load(self, key: ExpertKey, dtype: torch.dtype) -> ExpertWeights:
        try:
            return self._loader.load(key, dtype)
        except CorruptShard:
            self.holdings.drop(self.holdings.manifest.experts[key].hash)
            raise

    # --- serving --------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        member = self._member
        for spec, service in ((PEER, self._peers), (SHARD, self._shards), (EXPERT, self._experts)):
            handler = stream_handler(spec, member.secret, member.transport.peer, member.agent, service)
            await member.transport.serve(spec.name, handler)

    async def _leave(self) -> None:
        """Accept nothing new, withdraw, drain."""
        _log.info("leaving the swarm")
        self._experts.draining = True
        for spec in (EXPERT, SHARD, PEER):
            await self._member.transport.stop_serving(spec.name)
        await self._announcer.withdraw()
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self._worker.drain()
        except TimeoutError:
            _log.warning("left with requests unanswered", seconds=self._settings.drain_timeout)
