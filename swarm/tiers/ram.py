"""A memory tier: values under a byte budget, shared by threads, each loaded once however many want it.

Here is how it is used; how it loads is in loading.py.

It holds anything whose size can be told; in practice experts' weights. It knows no files, peers or tensors: how a value
is loaded is the caller's function, which runs outside the lock, and who leaves is the policy's decision.

The budget counts what is resident and what loads in flight have reserved, and is never exceeded. A value that is kept
after its lease has ended is memory that nobody counts. Where the machine has less memory than the budget says, a load
that fails for it lowers the budget and is tried once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from threading import get_ident
from typing import TypeVar

from .leases import Claim, Flight, Lease
from .loading import Loading, forget_frames
from .policy import Chances, Uses
from .residency import Speculation, Use
from .stats import TierStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RamTier(Loading[K, V]):
    """A cache of values of type V under keys of type K, using at most `budget_bytes`. `load` makes a value.

    `room` is what loading takes, in bytes, and `size` what the value takes afterwards, which must not be more. `group`
    sorts keys, such as by the layer of an expert. `out_of_memory` recognises a load's error that more room could have
    avoided. `freed` is called when bytes were given up without being needed for a load; `dropped` with every value that
    leaves, inside the lock. Where a value can be used before it is wholly there, as in a GPU's memory, `arrive` waits
    for the rest, after those who wait for the value went on. `wait` is how many seconds a miss waits for others to
    release what is in use. A thread that leases several entries at once should release before
    it asks for more than fits: two such threads can only wait for each other until `wait` ends.
    """

    # --- uses -----------------------------------------------------------------------------------------------------

    def note(self, uses: Uses[K], *, ahead: bool = True) -> Sequence[K]:
        """Say what a layer's call is about to use, for the policy and the statistics; returns what is absent.

        Absent entries begin to load where loader threads are free, unless not `ahead`. Lease what is resident first:
        the others arrive meanwhile.
        """
        with self._lock:
            return self._note(uses, ahead)

    def hold(self, layer: int, keys: Sequence[K]) -> Use[K, V]:
        """`note`, and a lease of all of `keys` that is resident, for a call that uses each for one token.

        Its entries are in the order of `keys`, None where one is absent. Take a value from its entry where it is
        computed with, and `release` them afterwards, before what is absent is leased. Not to be changed: `keys`.

        Decoding does this once per layer and token, where a lock per entry, or an object for a `with`, is felt.
        """
        with self._lock:
            use = None if self._failed else self._residency.hold(layer, keys, get_ident())
            if use is None:
                self._note(Uses(layer, dict.fromkeys(keys, 1)), ahead=True)
                use = Use(get_ident())
                self._residency.acquire(keys, use)
            return use

    def release(self, use: Use[K, V]) -> None:
        """End what `hold` began."""
        with self._lock:
            self._residency.release(use)
            if self._claims:
                self._notify()

    def _note(self, uses: Uses[K], ahead: bool) -> Sequence[K]:
        """Inside the lock: see `note`."""
        if self._failed:
            self._failed.clear()
        missing = self._residency.note(uses, want=ahead)
        if missing and ahead:
            self._drop_outdated(uses)
            # Where nothing is resident, this thread has nothing better to do than to load the first itself.
            self._load_ahead(uses.layer, missing if len(missing) < len(uses.rows) else missing[1:])
        return missing

    def want(self, layer: int, keys: Iterable[K]) -> None:
        """Spare these, where anything else can leave, until they were used or the next call of `layer` is noted."""
        with self._lock:
            self._residency.want(layer, keys)

    def begin(self, layer: int, keys: Iterable[K]) -> Sequence[K]:
        """Begin to load what is absent of these, as far as loader threads and bytes are free; which are on their way.

        Nothing that running calls are about to use leaves for it. None of these was asked for by `note`.
        """
        with self._lock:
            absent = [key for key in keys if key not in self._residency.entries]
            self._load_ahead(layer, absent)
            return [key for key in absent if key in self._flights]

    def begin_one(self, key: K, ended: Callable[[], None]) -> bool:
        """Begin to load one as `begin` does; whether it did. Then `ended` is called once it is loaded or has failed."""
        with self._lock:
            return key not in self._residency.entries and self._load_ahead(self._group(key), [key], ended) > 0

    def lease(self, key: K) -> Lease[K, V]:
        """The value under `key` for the length of a `with`, in which it is not evicted.

        Where it is absent, one caller loads it; all others who ask meanwhile wait, and get its value or its error.
        Entering raises BudgetTooSmall where the entry is larger than the budget, or too much stays in use for too long;
        MemoryExhausted; and whatever `load` raises.
        """
        return Lease(self, key)

    def try_lease(self, key: K) -> Lease[K, V] | None:
        """A lease of a resident value, already acquired: enter it, and only once. None where it is absent."""
        lease = Lease(self, key)
        with self._lock:
            return lease if self._residency.acquire((key,), lease) else None

    def abandon(self, error: BaseException) -> None:
        """Take back all that this thread has of the tier, whose call ended with `error`.

        What was leased has been released on the way, unless the thread was interrupted (Ctrl-C) between two lines of
        these methods, of a `with` or of a `finally`. For who began the call: nothing of it may be in use any more.
        The error keeps no memory of a tier either, as a notebook's last one would.
        """
        me = get_ident()
        forget_frames(error)
        with self._lock:
            self._borrowed = [claim for claim in self._borrowed if claim.thread != me]
            self._residency.recover(me, self._promised())
            self._notify()

    def put(self, claim: Claim[K], value: V, seconds: float) -> None:
        """Keep a value that somebody else loaded, in `seconds`, in the room of an `incoming`. A resident one stays."""
        key, size = claim.key, self._size_of(value)
        assert key is not None, "room for no entry"
        assert size <= claim.size, f"{key} takes {size} bytes, {claim.size} were announced"
        with self._lock:
            if key in self._residency.entries or key in self._flights:
                return
            self._borrowed.remove(claim)
            self._residency.cancel(claim.size - size)
            self._count_bytes(self._group(key), size)
            self._residency.counts(self._group(key)).loads.add(seconds)
            self._residency.publish(key, value, size)
            self._notify()

    # --- loading ahead --------------------------------------------------------------------------------------------

    def forecast(self, layer: int, chances: Chances) -> None:
        """Tell the policy how likely each entry of a group is used at its next call."""
        with self._lock:
            self._residency.policy.forecast(layer, chances)

    def prefetch(self, layer: int, ranked: Sequence[tuple[K, float]], *, most: int) -> int:
        """Begin to load what the next call of `layer` likely uses, the likeliest first; how many loads that are.

        `ranked` has chances beside the keys. At most `most` loads begin, on loader threads; none waits, and none takes
        the place of what is worth more. What is resident already is spared until that call.
        """
        with self._lock:
            self._residency.want(layer, [key for key, _ in ranked])
            started = 0
            for rank, (key, chance) in enumerate(ranked):
                if key in self._residency.entries or key in self._flights:
                    continue
                room = self._room_of(key)
                if started == most or not self._loaders or not self._reserve_spare(key, room, chance):
                    break
                self._submit(Flight(key, layer, room, Speculation(rank)))
                self._residency.speculation.loads += 1
                started += 1
            return started

    def absent(self, keys: Sequence[K]) -> Sequence[bool]:
        """Which of these are neither resident nor on their way."""
        with self._lock:
            return [key not in self._residency.entries and key not in self._flights for key in keys]

    def outcomes(self) -> Sequence[Speculation]:
        """Prefetched entries whose fate became known since the last call."""
        with self._lock:
            outcomes, self._residency.outcomes = self._residency.outcomes, []
            return outcomes

    def _load_ahead(self, layer: int, keys: Iterable[K], ended: Callable[[], None] | None = None) -> int:
        """Inside the lock: begin to load what is needed next, as far as loader threads and bytes are free; how many."""
        begun = 0
        busy = sum(1 for flight in self._flights.values() if flight.future is not None)
        for key in keys:
            if key in self._flights:
                continue
            room = self._room_of(key)
            if busy >= self._loaders or not self._reserve_spare(key, room):
                break
            flight = Flight[K, V](key, layer, room)
            flight.ended = ended
            self._submit(flight)
            begun, busy = begun + 1, busy + 1
        return begun

    def _drop_outdated(self, uses: Uses[K]) -> None:
        """Inside the lock: loads on suspicion that have not begun make way for what is needed."""
        for flight in list(self._flights.values()):
            outdated = flight.speculation is not None and not flight.users and flight.key not in uses.rows
            if outdated and flight.group == uses.layer and flight.future is not None and flight.future.cancel():
                del self._flights[flight.key]
                self._residency.cancel(flight.reserved)
                self._residency.speculation.loads -= 1
                self._residency.speculation.cancelled += 1
                self._notify()

    def look(self, see: Callable[[Sequence[V], Collection[K]], None]) -> None:
        """Show `see`, inside the lock, all resident values and the keys that are being loaded."""
        with self._lock:
            see([entry.value for entry in self._residency.entries.values()], self._flights.keys())

    def keys(self) -> Sequence[K]:
        """What is resident now."""
        with self._lock:
            return list(self._residency.entries)

    def evict(self, key: K) -> bool:
        """Drop a value; False where it is absent, in use or pinned."""
        with self._lock:
            evicted = self._residency.evict(key)
            self._notify()
        self._freed()
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
        self._freed()

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

    def _obtain(self, key: K, use: Use[K, V]) -> None:
        """Begin to use an entry that was absent a moment ago: loaded meanwhile, joined, or loaded here."""
        started = self._clock()
        boarded: list[Flight[K, V]] = []  # the newest is the one that this thread is on
        try:
            self._fetch(key, use, boarded)
            self._count_stall(key, self._clock() - started, boarded[-1].speculation if boarded else None)
        except BaseException as error:
            if boarded:
                self._leave(boarded[-1], use, error)
            raise

    def _fetch(self, key: K, use: Use[K, V], boarded: list[Flight[K, V]]) -> None:
        while not self._find(key, use, boarded):
            flight = boarded[-1]
            if flight.pilot == get_ident():
                self._fly(flight)
            else:
                flight.done.wait()
            if flight.landed:
                break
            if isinstance(flight.error, Exception) and flight.speculation is None:
                raise flight.error
            # A guess may fail for a reason that has passed, so whoever needs the entry tries again. Or else the
            # loading thread was interrupted (KeyboardInterrupt, SystemExit): that is its own affair. Load here.

    def _find(self, key: K, use: Use[K, V], boarded: list[Flight[K, V]]) -> bool:
        """Whether it is used now; if not, this thread is on the flight that is appended, waiting or as its pilot."""
        with self._lock:
            if (error := self._failed.pop(key, None)) is not None:
                raise error
            # Looked up again: the flight that was waited for may have been another thread's failure.
            flight = self._flights.get(key)
            if flight is None:
                if self._residency.acquire((key,), use):
                    return True
                flight = Flight(key, self._group(key), 0)
                flight.pilot = get_ident()
                self._flights[key] = flight
            boarded.append(flight)
            flight.users.append(use)
            self._notify()  # its claim to room may go before others now
            if flight.future is not None and flight.future.cancel():  # no loader thread has begun with it
                flight.future, flight.pilot = None, get_ident()
            return False

    def _leave(self, flight: Flight[K, V], use: Use[K, V], error: BaseException) -> None:
        """This thread was on a flight when it failed, or was interrupted (Ctrl-C): let nobody wait for it in vain."""
        with self._lock:
            flies = flight.pilot == get_ident() or (flight.future is not None and flight.future.cancelled())
            if flight.landed:
                self._residency.release(use)
                self._notify()
            elif flies:
                self._abort(flight, error)
            elif use in flight.users:
                flight.users.remove(use)
        if flies and not flight.done.is_set():  # it was not begun
            flight.end()

    def _count_stall(self, key: K, seconds: float, speculation: Speculation | None) -> None:
        with self._lock:
            counts = self._residency.counts(self._group(key))
            counts.stalls.add(seconds)
            self.stalled_seconds += seconds
            if speculation is not None and speculation.used is None:
                counts.late += 1
                hidden = max(0.0, speculation.seconds - seconds)
                self._residency.settle(speculation, used=True, hidden=hidden)
