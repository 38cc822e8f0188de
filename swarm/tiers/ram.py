"""The RAM tier: values under a byte budget, shared by threads, each loaded once however many want it.

It holds anything whose size can be told; in practice experts' weights. It knows no files, peers or tensors: how a value
is loaded is the caller's function, which runs outside the lock, and who leaves is the policy's decision.

The budget counts what is resident and what loads in flight have reserved. It is never exceeded where `size_hint` is
right. Without a hint a value's size is known only once it exists: then loads in flight come on top, each until it has
found room. A value that is kept after its lease has ended is memory that nobody counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from moehive.protocol.errors import BudgetTooSmall
from moehive.swarm.telemetry.meter import Meter

from .policy import Lru, Policy
from .residency import Entry, EntryFacts, Residency
from .stats import HitCounts, TierStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_WAIT = 60.0  # seconds a miss waits for others to release, before it reports what budget would have done


class _Flight(Generic[K, V]):
    """One load that is under way. Changed under the tier's lock; `done` is set afterwards."""

    __slots__ = ("done", "entry", "error", "users")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.users = 1  # leases that wait for it, the loading one included
        self.entry: Entry[K, V] | None = None
        self.error: BaseException | None = None


class RamTier(Generic[K, V]):
    """A cache of values of type V under keys of type K, using at most `budget_bytes`.

    `group` sorts keys for the statistics, such as the layer of an expert. `wait` is how many seconds a miss waits for
    others to release what is in use. A thread that leases several entries at once should release before it asks for
    more than fits: two such threads can only wait for each other until `wait` ends.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        policy: Policy[K] | None = None,
        group: Callable[[K], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: float = _WAIT,
    ) -> None:
        self._residency: Residency[K, V] = Residency(budget_bytes, Lru() if policy is None else policy, group)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # notified when something became evictable or unreserved
        self._waiting = 0
        self._flights: dict[K, _Flight[K, V]] = {}
        self._clock = clock
        self._wait = wait
        self._loads = self._failed_loads = self._loaded_bytes = 0
        self._load_seconds = self._slowest_load = 0.0
        self._meter = Meter()

    # --- leases ---------------------------------------------------------------------------------------------------

    def lease(
        self, key: K, load: Callable[[], V], size: Callable[[V], int], *, size_hint: int | None = None
    ) -> Lease[K, V]:
        """The value under `key` for the length of a `with`, in which it is not evicted.

        Where it is absent, one caller runs `load`; all others who ask meanwhile wait, and get its value or its error.
        `size` gives a value's bytes; `size_hint`, known beforehand, makes room before loading instead of after it.
        Entering raises BudgetTooSmall where the entry is larger than the budget, or too much stays in use for too long.
        """
        return Lease(self, key, load, size, size_hint)

    def try_lease(self, key: K) -> Lease[K, V] | None:
        """A lease of a resident value, already acquired: enter it, and only once. None where it is absent.

        Neither waits nor loads, and a None is not counted as a miss.
        """
        with self._lock:
            entry = self._residency.acquire(key)
        return None if entry is None else Lease(self, key, None, None, None, entry)

    def call_ended(self, group: int) -> None:
        """Count one call of a group, such as a layer: whether all that it leased was resident."""
        with self._lock:
            self._meter.called(group, self._residency.misses(group))

    # --- looking and ordering -------------------------------------------------------------------------------------

    def keys(self) -> Sequence[K]:
        """What is resident now."""
        with self._lock:
            return list(self._residency.entries)

    def facts(self) -> Sequence[EntryFacts[K]]:
        """What is resident now, in detail."""
        with self._lock:
            return self._residency.facts()

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident values."""
        return self._residency.resident

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self._residency.budget

    def evict(self, key: K) -> bool:
        """Drop a value; False where it is absent, in use or pinned."""
        with self._lock:
            evicted = self._residency.evict(key)
            self._notify()
            return evicted

    def pin(self, key: K) -> None:
        """Never evict `key`, whether it is resident already or not (it is not loaded by this)."""
        with self._lock:
            self._residency.pin(key)

    def unpin(self, key: K) -> None:
        """Undo `pin`."""
        with self._lock:
            self._residency.unpin(key)
            self._notify()

    def resize(self, budget_bytes: int) -> None:
        """Change the budget. Entries in use beyond a smaller one leave when they are released."""
        with self._lock:
            self._residency.resize(budget_bytes)
            self._notify()

    @property
    def stats(self) -> TierStats:
        """A snapshot."""
        with self._lock:
            held = self._residency
            groups = {name: HitCounts(counts.hits, counts.misses) for name, counts in held.groups.items()}
            return TierStats(
                budget_bytes=held.budget,
                resident_bytes=held.resident,
                reserved_bytes=held.reserved,
                entries=len(held.entries),
                hits=sum(counts.hits for counts in groups.values()),
                misses=sum(counts.misses for counts in groups.values()),
                loads=self._loads,
                failed_loads=self._failed_loads,
                evictions=held.evictions,
                loaded_bytes=self._loaded_bytes,
                load_seconds=self._load_seconds,
                slowest_load=self._slowest_load,
                groups=groups,
                meter=self._meter.facts,
            )

    # --- what Lease asks ------------------------------------------------------------------------------------------

    def _acquire(self, lease: Lease[K, V]) -> Entry[K, V]:
        """A use of the entry: resident, joined, or loaded here."""
        counted = False
        while True:
            with self._lock:
                flight = self._flights.get(lease.key)
                # Looked up again at each turn: the flight that was waited for may have been another thread's failure.
                if flight is None and (entry := self._residency.acquire(lease.key)) is not None:
                    return entry
                if not counted:
                    self._residency.missed(lease.key)
                    counted = True
                mine = flight is None
                if flight is None:
                    flight = self._flights[lease.key] = _Flight()
                else:
                    flight.users += 1
            if mine:
                return self._fly(lease, flight)
            flight.done.wait()
            if flight.entry is not None:
                return flight.entry
            if isinstance(flight.error, Exception):
                raise flight.error
            # The loading thread was interrupted (KeyboardInterrupt, SystemExit): that is its own affair. Load here.

    # --- loading --------------------------------------------------------------------------------------------------

    def _fly(self, lease: Lease[K, V], flight: _Flight[K, V]) -> Entry[K, V]:
        try:
            return self._load(lease, flight)
        except BaseException as error:
            flight.error = error
            with self._lock:
                self._failed_loads += 1
                del self._flights[lease.key]
                self._notify()
            raise
        finally:
            flight.done.set()

    def _load(self, lease: Lease[K, V], flight: _Flight[K, V]) -> Entry[K, V]:
        assert lease.load is not None, f"the lease of {lease.key} was entered again"
        assert lease.size is not None
        with self._lock:
            self._loads += 1
        reserved = lease.size_hint or 0
        self._reserve(lease.key, reserved)
        try:
            started = self._clock()
            value = lease.load()
            seconds = self._clock() - started
            size = lease.size(value)
            if size > reserved:
                self._reserve(lease.key, size - reserved, entry_size=size)
                reserved = size
        except BaseException:
            with self._lock:
                self._residency.cancel(reserved)
            raise
        with self._lock:
            self._residency.cancel(reserved - size)  # a hint that was too large
            self._loaded_bytes += size
            self._load_seconds += seconds
            self._slowest_load = max(self._slowest_load, seconds)
            self._meter.loaded(self._residency.group_of(lease.key), seconds, size)
            del self._flights[lease.key]
            self._notify()
            entry = flight.entry = self._residency.publish(lease.key, value, size, flight.users)
            return entry

    def _reserve(self, key: K, size: int, *, entry_size: int | None = None) -> None:
        """Wait until `size` bytes are promised to this load. Raises BudgetTooSmall."""
        entry_size = size if entry_size is None else entry_size
        with self._room:
            deadline = time.monotonic() + self._wait
            while not self._residency.reserve(key, size):
                budget, left = self._residency.budget, deadline - time.monotonic()
                if entry_size > budget:
                    raise BudgetTooSmall(f"RAM tier, {key}", budget=budget, needed=entry_size)
                if left <= 0:
                    needed = self._residency.kept + size
                    raise BudgetTooSmall(f"RAM tier, {key} beside all that is in use", budget=budget, needed=needed)
                self._waiting += 1
                try:
                    self._room.wait(left)
                finally:
                    self._waiting -= 1

    def _notify(self) -> None:
        """Inside the lock."""
        if self._waiting:
            self._room.notify_all()


class Lease(Generic[K, V]):
    """One use of one entry, as a context manager that gives the value. Not to be entered twice at a time."""

    __slots__ = ("_entry", "_tier", "key", "load", "size", "size_hint")

    def __init__(
        self,
        tier: RamTier[K, V],
        key: K,
        load: Callable[[], V] | None,
        size: Callable[[V], int] | None,
        size_hint: int | None,
        entry: Entry[K, V] | None = None,
    ) -> None:
        self._tier = tier
        self._entry = entry
        self.key = key
        self.load = load
        self.size = size
        self.size_hint = size_hint

    def __enter__(self) -> V:
        """Raises BudgetTooSmall, and whatever `load` or `size` raises."""
        entry = self._entry
        if entry is None:
            tier = self._tier
            with tier._lock:  # a hit takes this one step: it happens top_k times per layer and token
                entry = tier._residency.acquire(self.key)
            if entry is None:
                entry = tier._acquire(self)
            self._entry = entry
        return entry.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry, self._entry = self._entry, None
        assert entry is not None, "left without having been entered"
        tier = self._tier
        with tier._lock:
            if tier._residency.release(entry):
                tier._notify()
