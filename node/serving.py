"""A joined node at work: holds its part of one model, serves the three protocols, announces itself, leaves cleanly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from functools import partial

import torch

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.protocol.errors import BudgetTooSmall, CorruptShard
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.manifest import Manifest
from moehive.protocol.messages import EXPERT, PEER, SHARD, BulkOffer
from moehive.swarm.announcer import Announcer
from moehive.swarm.dispatch.request import DTYPES
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.memory import default_ram_budget, default_vram_budget
from moehive.swarm.model.device import DeviceExperts, accelerator_for
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.tier import WeightsTier, forms_of
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.rpc.direct import DirectServer
from moehive.swarm.rpc.server import Inbox, open_gate, stream_handler
from moehive.swarm.store.base import NotHeld, ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.tasks import task_group
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.transfer.pacing import paced
from moehive.swarm.transfer.tls.server import BulkServer, interfaces
from moehive.swarm.transfer.uploads import Uploads

from .acquisition import Acquisition
from .coverage import Coverage
from .demand import DemandMeter
from .disk import DiskWatch
from .holdings import Holdings
from .placement import Placement, Room
from .publishing import watch_copies
from .services import ExpertService, PeerService, ShardService
from .settings import NodeSettings
from .state import NodeState, NodeView
from .status import NodeFacts, NodeStatus, Phase, StatusFile
from .worker import ComputeWorker

_log = get_logger(__name__)


class Serving:
    """What a node does once it has joined and knows its model."""

    def __init__(
        self,
        settings: NodeSettings,
        member: Member,
        manifest: Manifest,
        source: ObjectSource,
        announcer: Announcer,
        state: NodeState | None = None,
    ) -> None:
        self._settings = settings
        self._member = member
        self._announcer = announcer
        self._state = state or NodeState()
        self.holdings = Holdings(manifest, source, on_change=self._claim, partials=member.downloads.partials)
        self._loader = ExpertLoader(manifest, source)
        ram_budget = settings.ram if settings.ram is not None else default_ram_budget()
        dtype = DTYPES[manifest.model.dtype]
        if ram_budget < (room := self._loader.largest_room(dtype)):
            raise BudgetTooSmall(f"memory for one expert of {manifest.model.name}", budget=ram_budget, needed=room)
        self._tier = WeightsTier(self._loader, ram_budget, read=self._read)
        self._device = self._open_device(dtype)
        forms = forms_of(self._loader, dtype, 1)
        self._slots = 0 if self._device is None else self._device.slots
        demand = DemandMeter()
        # Without what uploads take; and what is in device memory need not be in RAM.
        ram = self._tier.budget_bytes + self._slots * forms.widened
        placement = Placement(settings, member, manifest, source, Room(ram, forms), demand)
        self._acquisition = Acquisition(
            settings, member, source, self.holdings, placement, on_selected=partial(self._divide_ram, dtype)
        )
        self._worker = ComputeWorker(
            self._lease, self._loader.spec, settings.queue, note=self._note, device=self._device
        )
        self._uploads = Uploads(UploadLimits(slots=settings.upload_slots), rate=settings.upload_rate)
        self._bulk = BulkServer(
            settings.listen, settings.bulk_port, agent=member.agent, shelf=self.holdings, uploads=self._uploads
        )
        self._experts = ExpertService(self.holdings, self._worker, self._uploads, self._offer_direct, demand)
        self._inbox = Inbox()
        hosts = () if settings.direct_port is None else interfaces(settings.listen)
        self._direct = DirectServer(
            EXPERT,
            hosts,
            settings.direct_port or 0,
            agent=member.agent,
            handle=self._experts,
            gate=self._experts.gate,
        )
        self._shards = ShardService(self.holdings, self._uploads, self._offer_bulk)
        self._disk = DiskWatch(source) if isinstance(source, ContentStore) else None
        self._peers = PeerService(self.holdings, self._worker, self._uploads, lambda: announcer.record().value, demand)

    async def run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        """Hold, serve, announce; leave when `stop` is set."""
        state = self._state
        status = NodeStatus(self._member.transport.peer, self._facts, phase=lambda: state.phase, http=state.http)
        with closing(self._acquisition), closing(self._device or self._tier):
            state.view = NodeView(status, self._coverage)
            state.enter(Phase.LOADING)
            await self._run(stop, on_ready)

    async def _run(self, stop: asyncio.Event, on_ready: Callable[[], None]) -> None:
        async with self._bulk, self._direct, task_group() as tasks:
            working = [tasks.create_task(self._worker.run(), name="compute")]
            working.append(tasks.create_task(self._uploads.run(), name="uploads"))
            await self._serve()  # before `stop` is looked at: what is not served yet cannot be left
            working.append(tasks.create_task(self._hold(on_ready, stop), name="hold"))
            await stop.wait()
            await self._leave()
            for task in working:
                task.cancel()

    async def _hold(self, on_ready: Callable[[], None], enough: asyncio.Event) -> None:
        """Get what is to be held, announcing it as it comes: what is here can be used, and supplied, from the start."""
        async with task_group() as tasks:
            tasks.create_task(self._announcer.run(), name="announce")
            if self._settings.status is not None and (view := self._state.view) is not None:
                tasks.create_task(StatusFile(self._settings.status, view.status).run(), name="status")
            if self._disk is not None:
                tasks.create_task(self._disk.run(), name="disk")
            left = await self._acquisition.first_pass()
            if not await self._announcer.announce():
                _log.warning("no peer stored the first announcement; others find this node only later")
            self._state.enter(Phase.READY)
            on_ready()
            if (publishing := self._settings.publish) is not None:
                watch = watch_copies(self._member, self.holdings.manifest, publishing, enough)
                tasks.create_task(watch, name="copies")
            tasks.create_task(self._acquisition.maintain(left), name="maintain")
            tasks.create_task(self._acquisition.verify_all(), name="verify the rest")

    def _facts(self) -> NodeFacts:
        holdings, member = self.holdings, self._member
        return NodeFacts(
            model=holdings.manifest.model_id,
            model_name=holdings.manifest.model.name,
            held=len(holdings.experts),
            experts=len(holdings.manifest.experts),
            tier=self._tier.stats,
            stored=self._tier.stored_stats,
            device=self._settings.device,
            device_tier=None if self._device is None else self._device.device_stats,
            queue=self._worker.facts,
            limits=self._settings.queue,
            requests=self._worker.requests_done,
            batches=self._worker.batches_done,
            rows=self._worker.rows_done,
            latencies=self._worker.latencies,
            uploads=self._uploads.facts,
            received=member.downloads.stats.received,
            duplicate=member.downloads.stats.duplicate,
            wrong=member.downloads.stats.wrong,
            sending=dict(member.downloads.sending),
            peers=len(member.directory(holdings.manifest.model_id).holders.inventories),
            disk=None if self._disk is None else self._disk.usage,
        )

    def _coverage(self) -> Coverage:
        manifest, member = self.holdings.manifest, self._member
        return Coverage(
            manifest.model_id,
            frozenset(manifest.experts),
            member.transport.peer,
            self.holdings.experts,
            member.directory(manifest.model_id).holders,
        )

    def _open_device(self, dtype: torch.dtype) -> DeviceExperts | None:
        """The experts in the memory of the device that the settings name; None: the processor computes.

        Raises ConfigError where it is not here, BudgetTooSmall.
        """
        settings = self._settings
        accelerator = accelerator_for(settings.device, settings.vram)
        if accelerator is None:
            return None
        vram = default_vram_budget(accelerator.device) if settings.vram is None else settings.vram
        return DeviceExperts(self._loader, self._tier, accelerator, dtype, vram)

    def _divide_ram(self, dtype: torch.dtype, experts: int) -> None:
        """How RAM holds them: so many are to be held, some of them on the device."""
        uploads = self._device is not None and self._device.takes_stored
        kept = experts if uploads else max(1, experts - self._slots)
        self._tier.hold_stored(dtype, kept, uploads=uploads, may_pack=self._device is None)

    def _claim(self) -> None:
        holdings = self.holdings
        self._announcer.hold(
            holdings.experts, skeleton=holdings.skeleton, complete=holdings.complete, loading=holdings.is_loading
        )

    def _lease(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
        return self._tier.lease((ExpertKey(layer, expert), dtype))

    def _note(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> None:
        self._tier.note(
            Uses(layer, {(ExpertKey(layer, expert), dtype): count for expert, count in rows.items()}, tokens)
        )

    def _read(self, key: ExpertKey) -> StoredExpert:
        try:
            return self._loader.read(key)
        except (CorruptShard, NotHeld):  # somebody changed or deleted the file
            self.holdings.drop(self.holdings.manifest.experts[key].hash)
            raise

    async def _serve(self) -> None:
        member = self._member
        for spec, service, gate in (
            (PEER, self._peers, open_gate),
            (SHARD, self._shards, open_gate),
            (EXPERT, self._experts, self._experts.gate),
        ):
            handler = stream_handler(
                spec, member.secret, member.transport.peer, member.agent, service, self._inbox, gate
            )
            await member.transport.serve(spec.name, paced(handler, self._uploads) if spec is SHARD else handler)

    def _offer_direct(self, peer: PeerId) -> BulkOffer:
        return self._direct.offer(peer, self._member.transport.addresses)

    def _offer_bulk(self, peer: PeerId) -> BulkOffer:
        return self._bulk.offer(peer, self._member.transport.addresses)

    async def _leave(self) -> None:
        """Accept nothing new, withdraw, drain."""
        self._state.enter(Phase.LEAVING)
        _log.info("leaving the swarm")
        self._experts.refuse_more()
        for spec in (EXPERT, SHARD, PEER):
            await self._member.transport.stop_serving(spec.name)
        await self._announcer.withdraw()
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self._experts.drain()
        except TimeoutError:
            _log.warning("left with requests unanswered", seconds=self._settings.drain_timeout)
