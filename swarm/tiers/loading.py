"""The half of a memory tier that loads: flights, the threads that fly them, room for them, memory that runs out.

`ram.RamTier` is the other half, which is used. Both share one lock, and the bookkeeping of residency.py under it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from traceback import clear_frames
from typing import Final, Generic, TypeVar

from moehive.protocol.errors import MemoryExhausted
from moehive.protocol.units import format_size

from .leases import Claim, Flight
from .policy import Lru, Policy
from .residency import Residency

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

LOADERS: Final = 2  # threads that load ahead of the one that computes
_SMOOTHING: Final = 0.1
_LOOK: Final = 1.0  # seconds after which who waits for room looks for itself
_WAIT: Final = 60.0  # seconds a miss waits for others to release, before it reports what budget would have done


def forget_frames(error: BaseException) -> None:
    """Whoever keeps an error keeps no memory by it: its frames have what was half loaded, which nobody counts."""
    found: BaseException | None = error
    while found is not None:
        clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__


class Loading(Generic[K, V]):
    """What RamTier inherits; its arguments are described there."""

    def __init__(
        self,
        budget_bytes: int,
        load: Callable[[K], V],
        *,
        room: Callable[[K], int],
        size: Callable[[V], int],
        policy: Policy[K] | None = None,
        group: Callable[[K], int] = lambda _: 0,
        name: str = "RAM",
        loaders: int = LOADERS,
        out_of_memory: Callable[[Exception], bool] = lambda error: isinstance(error, MemoryError),
        freed: Callable[[], None] = lambda: None,
        dropped: Callable[[V], None] = lambda _: None,
        arrive: Callable[[V], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: float = _WAIT,
    ) -> None:
        self.name = name
        self._residency: Residency[K, V] = Residency(budget_bytes, Lru() if policy is None else policy, dropped)
        self._load_value = load
        self._room_of = room
        self._size_of = size
        self._group = group
        self._loaders = loaders
        self._out_of_memory = out_of_memory
        self._freed = freed
        self._arrive = arrive
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # notified when claims were granted, or what they are judged by
        self._claims: list[Claim[K]] = []  # of those who wait for room, the oldest first
        self._borrowed: list[Claim[K]] = []
        self._flights: dict[K, Flight[K, V]] = {}
        self._failed: dict[K, Exception] = {}  # loads ahead that failed before anybody waited for them
        self._pool: ThreadPoolExecutor | None = None
        self._failed_loads = self._loaded_bytes = self._shrinks = 0
        self.load_seconds = 0.0  # that one load takes, smoothed; 0 before the first
        self.stalled_seconds = 0.0  # that leases have waited for loads

    def close(self) -> None:
        """End the loader threads; a load that has begun is waited for. The tier loads without them afterwards."""
        with self._lock:
            pool, self._pool, self._loaders = self._pool, None, 0
        if pool is not None:
            pool.shutdown(wait=True)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident values."""
        return self._residency.resident

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self._residency.budget

    @property
    def excess_bytes(self) -> int:
        """Bytes beyond a budget that was lowered: in use, or promised to loads under way. They go when they can."""
        with self._lock:
            return self._residency.excess

    def _submit(self, flight: Flight[K, V]) -> None:
        """Inside the lock: let a loader thread fly it; its bytes are reserved."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._loaders, thread_name_prefix=f"{self.name.lower()}-loader")
        self._flights[flight.key] = flight
        flight.future = self._pool.submit(self._fly_ahead, flight)

    def _fly_ahead(self, flight: Flight[K, V]) -> None:
        """On a loader thread. An error is whoever's who waits for the entry, or who asks for it next."""
        with suppress(Exception):  # supervision point: it is kept in the flight
            self._fly(flight)

    def _fly(self, flight: Flight[K, V]) -> None:
        try:
            if not flight.reserved:
                self._reserve_for(flight)
            started = self._clock()
            flight.value = self._load(flight)
            coming = None if self._arrive is None else flight.value
            self._publish(flight, None if self._arrive else self._clock() - started)
        except BaseException as error:
            forget_frames(error)
            with self._lock:
                self._abort(flight, error)
            raise
        finally:
            flight.end()
        if self._arrive is not None and coming is not None:
            self._arrive(coming)
            with self._lock:
                self._count_seconds(flight.group, self._clock() - started)

    def _abort(self, flight: Flight[K, V], error: BaseException) -> None:
        """Inside the lock: it has failed, if it had not landed; its waiters are not told yet."""
        if self._flights.get(flight.key) is not flight:
            return
        flight.error = error
        reserved, flight.reserved = flight.reserved, 0
        self._residency.cancel(reserved)
        del self._flights[flight.key]
        self._failed_loads += 1
        if isinstance(error, Exception) and flight.speculation is None and not flight.users:
            self._failed[flight.key] = error
        self._notify()

    def _load(self, flight: Flight[K, V]) -> V:
        """The value. Where memory runs out the budget shrinks, and it is tried once more."""
        try:
            return self._load_value(flight.key)
        except Exception as error:
            if not self._out_of_memory(error):
                raise
        self._shrink(flight)  # outside the handler: the error's frames keep what was half loaded
        try:
            return self._load_value(flight.key)
        except Exception as error:
            if not self._out_of_memory(error):
                raise
            raise MemoryExhausted(
                f"{self.name} tier, {flight.key}: the machine has no memory for {format_size(flight.reserved)}, "
                f"although the budget was lowered to {format_size(self.budget_bytes)}"
            ) from error

    def _shrink(self, flight: Flight[K, V]) -> None:
        """What is held now, less one entry of this size, is evidently all that the machine has."""
        with self._lock:
            held = self._residency.resident + self._residency.reserved
            least = max(self._residency.kept, held - flight.reserved)
            self._residency.resize(min(self._residency.budget, least))  # it may have been lowered meanwhile
            self._shrinks += 1
        self._freed()

    def _publish(self, flight: Flight[K, V], seconds: float | None) -> None:
        """Make the value of a flight an entry, which took `seconds`, where that is known already.

        No frame refers to it, unless it has still to arrive: it may be evicted as soon as the lock is free.
        """
        assert flight.value is not None
        size = self._size_of(flight.value)
        assert size <= flight.reserved, f"{flight.key} takes {size} bytes, {flight.reserved} were announced"
        with self._lock:
            held = self._residency
            spare, flight.reserved = flight.reserved - size, 0  # from here on an interrupt gives nothing back twice
            held.cancel(spare)
            if flight.speculation is not None:
                flight.speculation.size, flight.speculation.seconds = size, seconds or 0.0
                held.speculation.bytes += size
            del self._flights[flight.key]
            held.publish(flight.key, flight.value, size, flight.users, flight.speculation)
            flight.value, flight.landed = None, True
            self._count_bytes(flight.group, size)
            if seconds is not None:
                self._count_seconds(flight.group, seconds)
            self._notify()

    def _count_bytes(self, group: int, size: int) -> None:
        """Inside the lock."""
        self._loaded_bytes += size
        self._residency.counts(group).loaded_bytes += size

    def _count_seconds(self, group: int, seconds: float) -> None:
        """Inside the lock: what a load took, until its value had arrived."""
        self._residency.counts(group).loads.add(seconds)
        self.load_seconds += (_SMOOTHING if self.load_seconds else 1.0) * (seconds - self.load_seconds)

    @contextmanager
    def borrow(self, size: int, what: str) -> Iterator[None]:
        """`size` bytes of the budget for `what`, which is no entry, as long as the context lasts.

        Waits for them as a load does; raises BudgetTooSmall.
        """
        claim = Claim[K](None, size)
        with self._room:
            self._reserve(claim, what)
            self._borrowed.append(claim)
        try:
            yield
        finally:
            self._give_back(claim)

    @contextmanager
    def incoming(self, key: K) -> Iterator[Claim[K] | None]:
        """The room that loading `key` takes, for somebody who loads it elsewhere and hands it to RamTier.put.

        Does not wait: None where there is no room now, or others wait for it. What was not put is given back.
        """
        claim = Claim(key, self._room_of(key))
        with self._lock:
            if not self._claims and self._residency.reserve(key, claim.size):
                self._borrowed.append(claim)
        try:
            yield claim if claim in self._borrowed else None
        finally:
            self._give_back(claim)

    def _give_back(self, claim: Claim[K]) -> None:
        """Borrowed bytes, unless they were given back, or taken back."""
        with self._lock:
            if claim in self._borrowed:
                self._borrowed.remove(claim)
                self._residency.cancel(claim.size)
                self._notify()

    def _reserve_for(self, flight: Flight[K, V]) -> None:
        """Wait until the bytes of a load are promised. Raises BudgetTooSmall."""
        room = self._room_of(flight.key)
        with self._room:
            self._reserve(Claim(flight.key, room), str(flight.key))
            flight.reserved = room

    def _promised(self) -> int:
        """Inside the lock: bytes that are reserved, by whom they are reserved for."""
        granted = [claim for claim in self._claims if claim.granted]
        flights = sum(flight.reserved for flight in self._flights.values())
        return flights + sum(claim.size for claim in [*granted, *self._borrowed])

    def _reserve(self, claim: Claim[K], what: str) -> None:
        """Inside the lock: wait until the bytes are promised."""
        if not self._claims and self._residency.reserve(claim.key, claim.size):
            return
        deadline = time.monotonic() + self._wait
        try:
            self._claims.append(claim)
            self._grant()
            while not claim.granted:
                left = deadline - time.monotonic()
                if left <= 0 or claim.size > self._residency.budget:
                    raise self._residency.refusal(f"{self.name} tier, {what}", claim.size)
                if not self._room.wait(min(left, _LOOK)):
                    self._notify()  # who released something may have been interrupted before it said so
        except BaseException:
            if claim.granted:
                self._residency.cancel(claim.size)
                self._notify()
            raise
        finally:
            self._claims.remove(claim)

    def _notify(self) -> None:
        """Inside the lock: something became evictable or unreserved, which goes to who waits for it longest.

        Not to whoever comes first: a thread that releases one entry and needs the next at once is there before any
        other has woken up, and would be again and again.
        """
        if self._claims:
            self._grant()
            self._room.notify_all()

    def _grant(self) -> None:
        """Inside the lock: promise room to those who wait for it, the oldest first.

        One that is too large for now holds up those behind it, or smaller ones would always be served before it. But
        not who has in use what it may be waiting for, and whoever those wait for: they come to an end first.
        """
        held_up = False
        holders = {use.thread for use in self._residency.uses} | {claim.thread for claim in self._borrowed}
        for claim in self._claims:
            if not claim.granted and not (held_up and holders.isdisjoint(self._waiting_for(claim))):
                claim.granted = self._residency.reserve(claim.key, claim.size)
                held_up = held_up or not claim.granted

    def _waiting_for(self, claim: Claim[K]) -> set[int]:
        """Inside the lock: the threads that go on once a claim is granted."""
        flight = None if claim.key is None else self._flights.get(claim.key)
        return {claim.thread} | {use.thread for use in (() if flight is None else flight.users)}

    def _reserve_spare(self, key: K, room: int, chance: float | None = None) -> bool:
        """Inside the lock: Residency.reserve_spare, but nothing while somebody waits for room."""
        return not self._claims and self._residency.reserve_spare(key, room, chance=chance)
