"""Makes room in a store whose budget is full: gathers the facts, lets the policy choose, deletes.

The swarm is asked only where abandoned downloads do not free enough. Without a swarm to ask only they can go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from moehive.protocol.ids import ModelId
from moehive.protocol.manifest import Manifest
from moehive.protocol.units import format_size

from .log import get_logger
from .policy.eviction import plan_eviction
from .store.catalogue import Cataloguer, Copies
from .store.content import ContentStore

ASK_AGAIN = 30.0  # seconds for which an answer of the swarm is good enough
CountCopies = Callable[[Mapping[ModelId, Manifest]], Awaitable[Copies]]
_log = get_logger(__name__)


class Room:
    """Room in one store. `count_copies` asks the swarm who else has what."""

    def __init__(
        self, store: ContentStore, count_copies: CountCopies, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._cataloguer = Cataloguer(store)
        self._count_copies = count_copies
        self._clock = clock
        self._copies: Copies = {}
        self._asked = float("-inf")
        self._lock = asyncio.Lock()  # what one task is about to delete, another must not count on

    async def make(self, needed: int) -> bool:
        """Free at least `needed` bytes, or nothing; whether they were freed. Raises StorageError."""
        async with self._lock:
            return await self._make({}, needed) or await self._make(await self._ask(), needed)

    async def _make(self, copies: Copies, needed: int) -> bool:
        catalogue = await asyncio.to_thread(self._cataloguer.take)
        plan = plan_eviction(catalogue.facts(copies), needed)
        if plan.freed < needed:
            return False
        victims = [victim.hash for victim in plan.victims]
        freed = await asyncio.to_thread(self._store.evict, victims, pins=catalogue.kept.pins)
        _log.info("objects evicted to make room", objects=len(victims), freed=format_size(freed))
        return freed >= needed

    async def _ask(self) -> Copies:
        if self._clock() - self._asked >= ASK_AGAIN:
            catalogue = await asyncio.to_thread(self._cataloguer.take)
            self._copies = await self._count_copies(catalogue.models)
            self._asked = self._clock()
        return self._copies
