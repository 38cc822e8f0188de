"""Who holds what: reads the announcements of one model, verifies them, and keeps the latest of each peer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from moehive.protocol.errors import FalseClaim, PeerError, TransportError
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.inventory import Inventory, decode_inventory, directory_key, swarm_tag
from moehive.protocol.manifest import ShardEntry

from .log import get_logger
from .standings import Standings
from .transport.base import Record, Transport

REFRESH_EVERY = 10.0  # seconds between look-ups in the background
LOOKUP_TIMEOUT = 10.0
_log = get_logger(__name__)


@dataclass(frozen=True)
class Holders:
    """A snapshot of the directory."""

    inventories: Mapping[PeerId, Inventory] = field(default_factory=dict)

    @cached_property
    def by_expert(self) -> Mapping[ExpertKey, tuple[PeerId, ...]]:
        """Peers that announce each expert that anybody announces, in a stable order."""
        by_expert: dict[ExpertKey, list[PeerId]] = {}
        for peer in sorted(self.inventories):
            for key in self.inventories[peer].held:
                by_expert.setdefault(key, []).append(peer)
        return {key: tuple(peers) for key, peers in by_expert.items()}

    def of(self, key: ExpertKey) -> tuple[PeerId, ...]:
        """Peers that announce an expert, in a stable order."""
        return self.by_expert.get(key, ())

    def suppliers(self, shard: ShardEntry) -> tuple[PeerId, ...]:
        """Peers that announce that a shard can be fetched from them: holders, and seeds of the whole model."""
        key = shard.expert_key
        return tuple(
            peer
            for peer, inventory in self.inventories.items()
            if inventory.complete or (inventory.skeleton if key is None else key in inventory.held)
        )

    @cached_property
    def loading(self) -> tuple[PeerId, ...]:
        """Peers that are fetching more, and may have parts of it already."""
        return tuple(peer for peer, inventory in self.inventories.items() if inventory.loading)

    @property
    def replicas(self) -> Mapping[ExpertKey, int]:
        """How many peers announce each expert that anybody announces."""
        return {key: len(peers) for key, peers in self.by_expert.items()}

    def addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Where a peer says that it can be dialled."""
        inventory = self.inventories.get(peer)
        return inventory.addresses if inventory else ()


class Directory:
    """The announcements of one model. `run()` keeps it fresh; `refresh()` looks up at once."""

    def __init__(
        self,
        transport: Transport,
        secret: bytes,
        model: ModelId,
        standings: Standings,
        *,
        on_announcement: Callable[[PeerId], None] = lambda peer: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._transport = transport
        self._key = directory_key(secret, model)
        self._tag = swarm_tag(secret)
        self.model = model
        self._standings = standings
        self._on_announcement = on_announcement  # of each newer one of a peer that offers something
        self._wall_clock = wall_clock
        self._lookup: asyncio.Task[None] | None = None
        self._known: dict[PeerId, Inventory] = {}
        self._refuted: dict[PeerId, dict[ExpertKey, float]] = {}  # when each was refused
        self.holders = Holders()

    async def run(self) -> None:
        """Look up for ever; failures are logged and tried again."""
        try:
            while True:
                try:
                    await self.refresh()
                except (TimeoutError, TransportError) as error:
                    reason = str(error) or "no answer in time"
                    _log.warning("directory look-up failed", model=self.model, reason=reason)
                await asyncio.sleep(REFRESH_EVERY)
        finally:
            if self._lookup is not None:  # shielded from whoever waited for it
                self._lookup.cancel()

    async def refresh(self) -> None:
        """One look-up; callers at the same time share it. Raises TimeoutError, TransportError."""
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.create_task(self._look_up(), name="directory look-up")
        await asyncio.shield(self._lookup)  # one caller that gives up does not end it for the others

    async def _look_up(self) -> None:
        # Its own deadline, not each caller's: otherwise who comes late to a look-up that hangs would join it.
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            records = await self._transport.get(self._key)
        for subkey, record in records.items():
            try:
                self._accept(subkey, record)
            except PeerError as error:
                # Names a peer only where its signature proves its fault: anybody can file nonsense under a name.
                _log.warning("announcement refused", filed_under=subkey, reason=error.reason)
                self._standings.blame(error)
        self._publish()

    def _accept(self, subkey: str, record: Record) -> None:
        inventory = decode_inventory(record.value, now=self._wall_clock())
        if (inventory.peer, inventory.model, inventory.swarm) != (subkey, self.model, self._tag):
            # Not the signer's fault: somebody filed a genuine record of another peer, model or swarm here.
            _log.warning("announcement filed under another name", filed_under=subkey, signer=inventory.peer)
            return
        known = self._known.get(inventory.peer)
        if known is None or known.issued < inventory.issued:
            self._known[inventory.peer] = inventory
            self._forgive(inventory)
            if _offers(inventory):
                self._on_announcement(inventory.peer)

    def _forgive(self, inventory: Inventory) -> None:
        """What a peer refused and no longer announces, it may take again and leave again: nodes follow the swarm."""
        refuted = self._refuted.get(inventory.peer, {})
        for key in refuted.keys() - inventory.held:
            del refuted[key]

    def _publish(self) -> None:
        now = self._wall_clock()
        self._known = {peer: inventory for peer, inventory in self._known.items() if inventory.expires > now}
        self._refuted = {peer: refuted for peer, refuted in self._refuted.items() if peer in self._known}
        # An announcement of nothing is a farewell; it is remembered, so that an older one does not come back.
        offering = {peer: inventory for peer, inventory in self._known.items() if _offers(inventory)}
        usable = {peer: i for peer, i in offering.items() if not self._standings.banned(peer)}
        if usable != self.holders.inventories:
            self.holders = Holders(usable)

    def refuted(self, peer: PeerId, keys: Iterable[ExpertKey] | None, reason: str) -> None:
        """A peer refused experts (None: all of them) that it announces: they no longer count as held by it.

        An honest peer may have lost or left an expert since it announced it, which its next announcement then says. One
        that announces it after it has refused it, and refuses it again, lies.
        """
        known = self._known.get(peer)
        if known is None:
            return
        untrue = known.held if keys is None else known.held & frozenset(keys)
        before = self._refuted.setdefault(peer, {})
        if any(before.get(key, known.issued) < known.issued for key in untrue):
            self._standings.blame(FalseClaim(f"announces again what it refuses: {reason}", peer=peer))
        before.update(dict.fromkeys(untrue, max(known.issued, self._wall_clock())))
        self._known[peer] = replace(known, held=known.held - untrue)
        self._publish()


def _offers(inventory: Inventory) -> bool:
    """Whether it is more than a farewell."""
    return bool(inventory.held or inventory.skeleton or inventory.complete or inventory.loading)
