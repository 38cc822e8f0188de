"""A memory tier: values under a byte budget, shared by threads, each loaded once however many want it.

It holds anything whose size can be told; in practice experts' weights, in host memory or on a device. It knows no files,
peers or tensors: how a value is loaded is the caller's function, which runs outside the lock, and who leaves is the
policy's decision.

The budget counts what is resident and what loads in flight have reserved, and is never exceeded. A value that is kept
after its step has ended is memory that nobody counts. Where the machine has less memory than the budget says, a load
that fails for it lowers the budget and is tried once more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

from moehive.protocol.errors import BudgetTooSmall, MemoryExhausted

from .policy import Lru, Policy, Uses
from .residency import Entry, EntryFacts, Residency, Speculation
from .stats import TierStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

LOADERS: Final = 2  # threads that load ahead of the one that computes
_LOOK_AHEAD: Final = 4  # entries of a step that may begin to load before it asks for them
_WAIT: Final = 60.0  # seconds a miss waits for others to release, before it reports what budget would have done


class _Flight(Generic[K, V]):
    """One load that is under way or about to be. Changed under the tier's lock; `done` is set afterwards."""

    __slots__ = ("done", "entry", "error", "future", "group", "key", "reserved", "speculation", "users")

    def __init__(self, key: K, group: int, reserved: int, users: int, speculation: Speculation | None = None) -> None:
        self.key = key
        self.group = group
        self.reserved = reserved  # bytes
        self.users = users  # steps that wait for it
        self.speculation = speculation
        self.done = threading.Event()
        self.future: Future[None] | None = None  # of the loader thread; None: who needs it loads it
        self.entry: Entry[K, V] | None = None
        self.error: BaseException | None = None


class RamTier(Generic[K, V]):
    """A cache of values of type V under keys of type K, using at most `budget_bytes`.

    `load` makes a value. `room` is what loading it takes, in bytes, and `size` what it takes afterwards, which must not
    be more. `group` sorts keys for statistics and steps, such as the layer of an expert. `wait` is how many seconds a
    miss waits for others to release what is in use.
    """

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
        clock: Callable[[], float] = time.monotonic,
        wait: float = _WAIT,
    ) -> None:
        self.name = name
        self._residency: Residency[K, V] = Residency(budget_bytes, Lru() if policy is None else policy)
        self._load_value = load
        self._room_of = room
        self._size_of = size
        self._group = group
        self._loaders = loaders
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # notified when something became evictable or unreserved
        self._waiting = 0
        self._flights: dict[K, _Flight[K, V]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._failed_loads = self._loaded_bytes = self._shrinks = 0

    def close(self) -> None:
        """End the loader threads; a load that has begun is waited for. The tier loads without them afterwards."""
        with self._lock:
            pool, self._pool, self._loaders = self._pool, None, 0
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=False)

    # --- steps ----------------------------------------------------------------------------------------------------

    def step(self, uses: Uses[K]) -> Step[K, V]:
        """What one call of a layer uses, for the length of a `with`; see Step. Missing entries begin to load."""
        return Step(self, uses)

    def lease(self, key: K) -> Lease[K, V]:
        """A step of one entry: a context manager that gives its value."""
        return Lease(self, key)

    def forecast(self, layer: int, chances: Sequence[float]) -> None:
        """Tell the policy how likely each entry of a group is used at its next step."""
        with self._lock:
            self._residency.policy.forecast(layer, chances)  # type: ignore[arg-type]

    def prefetch(self, layer: int, ranked: Sequence[tuple[K, float]], *, most: int) -> int:
        """Begin to load what the next step of `layer` likely uses, the likeliest first; how many loads that are.

        `ranked` has chances beside the keys. At most `most` loads begin, on loader threads; none waits, and none takes
        the place of what is worth more. What is resident already is spared until that step.
        """
        with self._lock:
            self._residency.expect(layer, [key for key, _ in ranked])
            started = 0
            for rank, (key, chance) in enumerate(ranked):
                if key in self._residency.entries or key in self._flights:
                    continue
                if started == most or not self._loaders:
                    break
                room = self._room_of(key)
                if not self._residency.reserve_spare(key, room, chance=chance):
                    break
                speculation = Speculation(rank)
                self._submit(_Flight(key, layer, room, 0, speculation))
                self._residency.speculation.loads += 1
                started += 1
            return started

    def outcomes(self) -> Sequence[Speculation]:
        """Prefetched entries whose fate became known since the last call."""
        with self._lock:
            outcomes, self._residency.outcomes = self._residency.outcomes, []
            return outcomes

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
            return TierStats(
                name=self.name,
                budget_bytes=held.budget,
                resident_bytes=held.resident,
                reserved_bytes=held.reserved,
                entries=len(held.entries),
                loaded_bytes=self._loaded_bytes,
                failed_loads=self._failed_loads,
                evictions=held.evictions,
                shrinks=self._shrinks,
                speculation=replace(held.speculation),
                groups={group: counts.copy() for group, counts in held.groups.items()},
            )

    # --- what Step asks -------------------------------------------------------------------------------------------

    def _begin(self, uses: Uses[K]) -> dict[K, Entry[K, V]]:
        """Use what is resident, begin to load what is not."""
        with self._lock:
            held = {entry.key: entry for entry in self._residency.begin(uses)}
            if len(held) < len(uses.rows):
                self._drop_outdated(uses)
                missing = [key for key in uses.rows if key not in held]
                # Where nothing is resident, this thread has nothing better to do than to load the first.
                self._load_ahead(uses.layer, missing if held else missing[1:])
            return held

    def _ahead(self, layer: int, keys: Sequence[K]) -> None:
        """Begin to load what this step takes next, as far as loader threads and bytes are free."""
        with self._lock:
            self._load_ahead(layer, keys)

    def _load_ahead(self, layer: int, keys: Sequence[K]) -> None:
        for key in keys:
            if key in self._residency.entries or key in self._flights:
                continue
            busy = sum(1 for flight in self._flights.values() if flight.future is not None)
            room = self._room_of(key)
            if busy >= self._loaders or not self._residency.reserve_spare(key, room):
                return
            self._submit(_Flight(key, layer, room, 0))

    def _drop_outdated(self, uses: Uses[K]) -> None:
        """Loads on suspicion that have not begun make way for what is needed."""
        for flight in list(self._flights.values()):
            outdated = flight.speculation is not None and not flight.users and flight.key not in uses.rows
            if outdated and flight.group == uses.layer and flight.future is not None and flight.future.cancel():
                del self._flights[flight.key]
                self._residency.cancel(flight.reserved)
                self._residency.speculation.loads -= 1
                self._residency.speculation.cancelled += 1

    def _obtain(self, key: K, let_go: Callable[[], None], *, was_there: bool) -> Entry[K, V]:
        """A use of an entry that the step does not hold: loaded meanwhile, joined, or loaded here.

        `let_go` releases what else the step holds; called before waiting for others to release. `was_there` says that
        the entry was counted as a hit, and let go since.
        """
        started = self._clock()
        while True:
            entry, flight, mine = self._find(key)
            if entry is not None:
                break
            if was_there:
                self._count_lost(key)
                was_there = False
            assert flight is not None
            if mine:
                entry = self._fly(flight, let_go)
                break
            flight.done.wait()
            if flight.entry is not None:
                entry = flight.entry
                break
            if isinstance(flight.error, Exception):
                raise flight.error
            # The loading thread was interrupted (KeyboardInterrupt, SystemExit): that is its own affair. Load here.
        self._count_stall(key, self._clock() - started, flight.speculation if flight else None)
        return entry

    def _find(self, key: K) -> tuple[Entry[K, V] | None, _Flight[K, V] | None, bool]:
        """The entry, now used; or else the flight to wait for, and whether it is this thread that has to fly it."""
        with self._lock:
            entry = self._residency.acquire(key)
            if entry is not None:
                return entry, None, False
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(key, self._group(key), 0, 1)
                return None, flight, True
            flight.users += 1
            stolen = flight.future is not None and flight.future.cancel()  # no loader thread has begun with it
            if stolen:
                flight.future = None
            return None, flight, stolen

    def _count_lost(self, key: K) -> None:
        with self._lock:
            counts = self._residency.counts(self._group(key))
            counts.hits -= 1
            counts.misses += 1

    def _count_stall(self, key: K, seconds: float, speculation: Speculation | None) -> None:
        with self._lock:
            counts = self._residency.counts(self._group(key))
            counts.stalls.add(seconds)
            if speculation is not None and speculation.used is None:
                counts.late += 1
                hidden = max(0.0, speculation.seconds - seconds)
                self._residency.settle(speculation, used=True, hidden=hidden)

    # --- loading --------------------------------------------------------------------------------------------------

    def _submit(self, flight: _Flight[K, V]) -> None:
        """Inside the lock: let a loader thread fly it; its bytes are reserved."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._loaders, thread_name_prefix=f"{self.name.lower()}-loader")
        self._flights[flight.key] = flight
        flight.future = self._pool.submit(self._fly_ahead, flight)

    def _fly_ahead(self, flight: _Flight[K, V]) -> None:
        """On a loader thread. An error is whoever's who waits; where nobody does, the next use tries again."""
        try:
            self._fly(flight, _nothing)
        except Exception:  # noqa: BLE001, S110 - supervision point: kept in the flight
            pass

    def _fly(self, flight: _Flight[K, V], let_go: Callable[[], None]) -> Entry[K, V]:
        try:
            if not flight.reserved:
                self._reserve(flight, let_go)
            value, seconds = self._load(flight)
            return self._publish(flight, value, seconds)
        except BaseException as error:
            flight.error = error
            with self._lock:
                self._failed_loads += 1
                self._residency.cancel(flight.reserved)
                del self._flights[flight.key]
                self._notify()
            raise
        finally:
            flight.done.set()

    def _load(self, flight: _Flight[K, V]) -> tuple[V, float]:
        """The value and the seconds it took. Where memory runs out the budget shrinks, and it is tried once more."""
        started = self._clock()
        try:
            value = self._load_value(flight.key)
        except MemoryError:
            self._shrink(flight)
            try:
                value = self._load_value(flight.key)
            except MemoryError as error:
                raise MemoryExhausted(
                    f"{self.name} tier, {flight.key}: the machine has no memory for {flight.reserved} bytes, although "
                    f"the budget was lowered to {self.budget_bytes}"
                ) from error
        return value, self._clock() - started

    def _shrink(self, flight: _Flight[K, V]) -> None:
        """What is held now, less one entry of this size, is evidently all that the machine has."""
        with self._lock:
            held = self._residency.resident + self._residency.reserved
            self._residency.resize(max(self._residency.kept, held - flight.reserved))
            self._shrinks += 1

    def _publish(self, flight: _Flight[K, V], value: V, seconds: float) -> Entry[K, V]:
        size = self._size_of(value)
        assert size <= flight.reserved, f"{flight.key} takes {size} bytes, {flight.reserved} were announced"
        with self._lock:
            held = self._residency
            held.cancel(flight.reserved - size)
            flight.reserved = 0
            self._loaded_bytes += size
            held.counts(flight.group).loads.add(seconds)
            if flight.speculation is not None:
                flight.speculation.size, flight.speculation.seconds = size, seconds
                held.speculation.bytes += size
            del self._flights[flight.key]
            entry = flight.entry = held.publish(flight.key, value, size, flight.users, flight.speculation)
            self._notify()
            return entry

    def _reserve(self, flight: _Flight[K, V], let_go: Callable[[], None]) -> None:
        """Wait until the bytes of a load are promised. Raises BudgetTooSmall."""
        key, room = flight.key, self._room_of(flight.key)
        with self._room:
            if self._residency.reserve(key, room):
                flight.reserved = room
                return
        let_go()  # whoever waits holds nothing that others may wait for
        with self._room:
            deadline = time.monotonic() + self._wait
            while not self._residency.reserve(key, room):
                budget, left = self._residency.budget, deadline - time.monotonic()
                if room > budget:
                    raise BudgetTooSmall(f"{self.name} tier, {key}", budget=budget, needed=room)
                if left <= 0:
                    needed = self._residency.kept + room
                    raise BudgetTooSmall(
                        f"{self.name} tier, {key} beside all that is in use", budget=budget, needed=needed
                    )
                self._waiting += 1
                try:
                    self._room.wait(left)
                finally:
                    self._waiting -= 1
            flight.reserved = room

    def _end(self, held: Sequence[Entry[K, V]], wanted: Sequence[K]) -> None:
        """End uses, and what a step still wanted."""
        with self._lock:
            for key in wanted:
                self._residency.unwant(key)
            for entry in held:
                self._residency.release(entry)
            self._notify()

    def _notify(self) -> None:
        """Inside the lock."""
        if self._waiting:
            self._room.notify_all()


class Step(Generic[K, V]):
    """The entries of one step, as a context manager, each protected until it was given out.

    Iterate once, over `in_order` or `any_order`; a value is the step's until the next one is asked for. Raises
    BudgetTooSmall, MemoryExhausted, and whatever the tier's `load` raises.
    """

    __slots__ = ("_given", "_held", "_left", "_lost", "_tier", "_uses")

    def __init__(self, tier: RamTier[K, V], uses: Uses[K]) -> None:
        self._tier = tier
        self._uses = uses
        self._held: dict[K, Entry[K, V]] = {}  # resident and protected, not given out yet
        self._left: dict[K, None] = {}  # not given out yet, in the order of the uses
        self._given: dict[K, Entry[K, V]] = {}  # given out and not released yet
        self._lost: set[K] = set()  # were resident, and had to be let go

    def __enter__(self) -> Self:
        self._held = self._tier._begin(self._uses)
        self._left = dict.fromkeys(self._uses.rows)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        held, given, left = self._held, self._given, self._left
        self._held, self._given, self._left = {}, {}, {}
        self._tier._end([*held.values(), *given.values()], [*left, *given])

    def in_order(self) -> Iterator[tuple[K, V]]:
        """Every key and value in the order of the uses. For many entries: each is released before the next is given."""
        for key in self._uses.rows:
            if self._given:
                self._tier._end(list(self._given.values()), list(self._given))
                self._given = {}
            yield key, self._give(key)

    def any_order(self) -> Iterator[tuple[K, V]]:
        """Every key and value, those first that were resident: the others load meanwhile. For few entries."""
        for key in list(self._held):
            yield key, self._give(key)
        for key in list(self._left):
            yield key, self._give(key)

    def _give(self, key: K) -> V:
        entry = self._held.pop(key, None)
        if entry is None:
            following = [k for k in islice(self._left, 1, 1 + _LOOK_AHEAD) if k not in self._held]
            if following:
                self._tier._ahead(self._uses.layer, following)
            entry = self._tier._obtain(key, self._let_go, was_there=key in self._lost)
        del self._left[key]
        self._given[key] = entry
        return entry.value

    def _let_go(self) -> None:
        """Nothing is used right now, and others may be waiting for what this step holds."""
        held, given = self._held, self._given
        self._held, self._given = {}, {}
        self._lost.update(held)
        self._tier._end([*held.values(), *given.values()], list(given))


class Lease(Generic[K, V]):
    """A step of one entry: a context manager that gives the value."""

    __slots__ = ("_step",)

    def __init__(self, tier: RamTier[K, V], key: K) -> None:
        self._step = Step(tier, Uses(tier._group(key), {key: 1}))

    def __enter__(self) -> V:
        """Raises what Step raises."""
        self._step.__enter__()
        try:
            return next(self._step.any_order())[1]
        except BaseException:
            self._step.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._step.__exit__(kind, error, trace)


def _nothing() -> None:
    pass
