"""What this node is to hold: told by its settings, or chosen from what the swarm lacks, at the start and ever after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from moehive.protocol.errors import PeerError, TransportError
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.protocol.messages import Demand, GetDemand
from moehive.swarm.directory import Directory, Holders
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.policy.budgets import ExpertForms
from moehive.swarm.policy.placement import choose_experts, rarest_first
from moehive.swarm.policy.rebalance import Change, Place, View, lacking, rebalance
from moehive.swarm.replicas import answering
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore

from .demand import DemandMeter
from .selection import AUTO, parse_selection
from .settings import NodeSettings

TURN = 60.0  # seconds after which others may leave what too many hold: long enough for all to have seen who did
ASK_EVERY = 10  # looks between two questions for demand
ASK_AT_MOST = 32  # peers, those that hold most first
ASK_TIMEOUT = 5.0  # seconds
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What this node has room for."""

    ram: int  # bytes for experts
    forms: ExpertForms  # of one expert in memory: quantised ones grow where they are computed with


class Placement:
    """The choice of experts. `first` makes it, `look` says what is to change; used on the event loop."""

    def __init__(
        self,
        settings: NodeSettings,
        member: Member,
        manifest: Manifest,
        source: ObjectSource,
        room: Room,
        demand: DemandMeter | None = None,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._member = member
        self._manifest = manifest
        self._source = source
        self._room = room
        self._demand = demand or DemandMeter()
        self._wall_clock = wall_clock
        self._us = member.transport.peer
        self._lacking: Mapping[ExpertKey, int] = {}
        self._asked: Mapping[ExpertKey, float] = {}  # what the others said
        self._looks = 0

    @property
    def follows(self) -> bool:
        """Whether the choice is this node's, and changes with the swarm."""
        return self._settings.experts == AUTO and self._settings.publish is None

    async def first(self) -> list[ShardEntry]:
        """What is to be held, what the swarm lacks most first; others who load now do not begin with the same.

        Raises ConfigError, StorageError.
        """
        selected = await self._select()
        replicas = self._replicas(self._member.directory(self._manifest.model_id).holders)
        here = await asyncio.to_thread(self._here)
        order = rarest_first(selected, replicas, seed=self._us, here=here)
        experts = [self._manifest.experts[key] for key in order]
        return [*experts, *self._manifest.skeleton] if self._settings.skeleton else experts

    async def look(self, held: frozenset[ExpertKey]) -> Change:
        """What to take and to leave, now that the swarm is as it is; `held` are this node's. Raises StorageError."""
        directory = self._member.directory(self._manifest.model_id)
        try:
            await directory.refresh()
        except (TimeoutError, TransportError) as error:
            _log.debug("nobody could be asked who holds what", reason=str(error))
            return Change()
        if self._looks % ASK_EVERY == 0:
            self._asked = await self._ask_demand(directory)
        self._looks += 1
        view, place = await asyncio.to_thread(self._see, directory.holders, held, self._demand.rates())
        self._lacking = lacking(view)
        change = await asyncio.to_thread(rebalance, view, place)
        if change.leave:  # not for what is only announced
            certain = await answering(self._member, self._manifest.model_id) or Holders()
            view = replace(view, certain={key: self._others(certain, key) for key in held})
            change = await asyncio.to_thread(rebalance, view, place)
        return change

    # --- the first choice -----------------------------------------------------------------------------------------

    async def _select(self) -> frozenset[ExpertKey]:
        if self._settings.experts != AUTO:
            return parse_selection(self._settings.experts, self._manifest.model)
        directory = self._member.directory(self._manifest.model_id)
        try:
            await directory.refresh()
        except TimeoutError:
            _log.warning("nobody could be asked who holds what; choosing by what is known")
        return await asyncio.to_thread(self._choose, directory.holders)

    def _choose(self, holders: Holders) -> frozenset[ExpertKey]:
        """Blocks, as `_see`."""
        forms = self._room.forms
        return choose_experts(
            dict(self._obtainable(holders)),
            self._replicas(holders),
            budgets=self._budgets(),
            widened=forms.widened,
            stored=min(forms.stored, forms.widened),
            reserve=forms.floor * forms.widened,
            seed=self._us,
            here=self._here(),
        )

    def _replicas(self, holders: Holders) -> Mapping[ExpertKey, int]:
        """Other peers that hold each expert: what this node itself announced before it was restarted does not count."""
        return {key: count for key in self._manifest.experts if (count := len(self._others(holders, key)))}

    def _others(self, holders: Holders, key: ExpertKey) -> tuple[PeerId, ...]:
        return tuple(peer for peer in holders.of(key) if peer != self._us)

    def _here(self) -> frozenset[ExpertKey]:
        shards = self._manifest.experts.items()
        return frozenset(key for key, shard in shards if self._source.path(shard.hash) is not None)

    def _obtainable(self, holders: Holders) -> Iterator[tuple[ExpertKey, int]]:
        """The experts that are here or that a peer or a seed can supply, with their bytes on disk."""
        for key, shard in self._manifest.experts.items():
            here = self._source.path(shard.hash) is not None
            if shard.group is None and (here or holders.suppliers(shard) or self._member.seeds.sources(shard.hash)):
                yield key, shard.size

    # --- room -----------------------------------------------------------------------------------------------------

    def _budgets(self) -> list[int]:
        """Bytes of memory and, where that is bounded, of disk. Blocks on the disk."""
        disk = [self._disk_for_experts(self._source)] if isinstance(self._source, ContentStore) else []
        return [self._room.ram, *disk]

    def _disk_for_experts(self, store: ContentStore) -> int:
        """Bytes that experts may take of the disk budget: what they take already, and what is free beyond the skeleton.

        Other models' objects stay: nothing is deleted for a choice that we make ourselves.
        """
        held = store.objects()
        experts = sum(shard.size for shard in self._manifest.experts.values() if shard.hash in held)
        missing = [shard for shard in self._manifest.skeleton if self._settings.skeleton and shard.hash not in held]
        free = self._settings.disk - store.usage().used_bytes - sum(shard.size for shard in missing)
        return max(0, experts + free)

    def _place(self, sizes: Mapping[ExpertKey, int]) -> Place:
        """Room in numbers of experts, which are of nearly one size."""
        forms, (ram, *disk) = self._room.forms, self._budgets()
        size = -(-sum(sizes.values()) // max(1, len(sizes)))
        on_disk = [each // max(1, size) for each in disk]
        fast = min(ram // forms.widened, *on_disk, len(sizes))
        as_stored = (ram - forms.floor * forms.widened) // max(1, min(forms.stored, forms.widened))
        return Place(fast, max(fast, min(as_stored, *on_disk, len(sizes))))

    # --- the change -----------------------------------------------------------------------------------------------

    def _see(self, holders: Holders, held: frozenset[ExpertKey], ours: Mapping[ExpertKey, float]) -> tuple[View, Place]:
        """What there is to decide on. Blocks: it looks for thousands of files, and the node answers meanwhile."""
        sizes = dict(self._obtainable(holders))
        return self._view(holders, held, sizes, ours), self._place(sizes)

    def _view(
        self,
        holders: Holders,
        held: frozenset[ExpertKey],
        sizes: Mapping[ExpertKey, int],
        ours: Mapping[ExpertKey, float],
    ) -> View:
        others = {key: peers for key in self._manifest.experts if (peers := self._others(holders, key))}
        return View(
            us=self._us,
            peers=tuple({*holders.inventories, self._us}),
            holders=others,
            held=held,
            obtainable=frozenset(sizes),
            lacking=self._lacking,
            demand={key: ours.get(key, 0.0) + self._asked.get(key, 0.0) for key in ours.keys() | self._asked.keys()},
            turn=int(self._wall_clock() // TURN),
        )

    # --- what others say ------------------------------------------------------------------------------------------

    async def _ask_demand(self, directory: Directory) -> Mapping[ExpertKey, float]:
        """Rows per second that the peers say they are asked for, added up."""
        announced = [one for one in directory.holders.inventories.values() if one.held and one.peer != self._us]
        asked = sorted(announced, key=lambda one: -len(one.held))[:ASK_AT_MOST]
        answers = await asyncio.gather(*(self._demand_of(directory, one.peer) for one in asked))
        total: dict[ExpertKey, float] = {}
        for one, rates in zip(asked, answers, strict=True):
            for key in one.held & rates.keys():  # what it does not hold it cannot have been asked for
                total[key] = total.get(key, 0.0) + rates[key]
        return total

    async def _demand_of(self, directory: Directory, peer: PeerId) -> Mapping[ExpertKey, float]:
        member, addresses = self._member, directory.holders.addresses(peer)
        try:
            connection = await member.peers.connection(peer, addresses, timeout=ASK_TIMEOUT)
            answer = await connection.ask(GetDemand(model=directory.model), timeout=ASK_TIMEOUT)
            assert isinstance(answer.message, Demand)
            return answer.message.rates()
        except PeerError as error:
            error.peer = error.peer or peer
            member.standings.blame(error)
            return {}
