"""The bookkeeping of a tier: what is resident, reserved and in use, and what must leave. It never waits, loads, locks.

Every rule that must hold under any interleaving of threads lives here, where a test can interleave calls as it likes:
bytes resident and reserved stay within the budget; what is in use or pinned stays; a load that fails leaves no trace.
`ram.RamTier` adds the lock, the threads that wait and the loading.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .policy import Policy, Uses, choose_victims
from .stats import Counts, SpeculationCounts

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class EntryFacts(Generic[K]):
    """One resident entry as others may see it."""

    key: K
    size: int  # bytes
    in_use: int  # leases now
    pinned: bool


@dataclass(slots=True)
class Speculation:
    """Something that is loaded because it may be needed soon: what was expected of it, and what became of it."""

    rank: int  # 0 is the likeliest of its layer
    size: int = 0  # bytes
    seconds: float = 0.0  # of loading
    used: bool | None = None  # None: not known yet
    hidden: float = 0.0  # seconds of loading that nobody waited for, where it was used


class Entry(Generic[K, V]):
    """One resident value. Whoever changes it holds the tier's lock."""

    __slots__ = ("in_use", "key", "size", "speculation", "value")

    def __init__(self, key: K, value: V, size: int, in_use: int, speculation: Speculation | None) -> None:
        self.key = key
        self.value = value
        self.size = size
        self.in_use = in_use
        self.speculation = speculation  # until it is used for the first time


class Residency(Generic[K, V]):
    """Entries and reservations within `budget` bytes. Not thread-safe."""

    def __init__(self, budget: int, policy: Policy[K]) -> None:
        self.budget = budget
        self.entries: dict[K, Entry[K, V]] = {}
        self.sizes: dict[K, int] = {}  # of the entries
        self.groups: dict[int, Counts] = {}
        self.speculation = SpeculationCounts()
        self.outcomes: list[Speculation] = []  # whose fate became known since somebody took them
        self.resident = 0  # bytes
        self.reserved = 0  # bytes promised to loads in flight
        self.evictions = 0
        self.policy = policy
        self._pinned: set[K] = set()
        self._wanted: dict[K, int] = {}  # by how many running steps, in the order of use
        self._expected: dict[int, list[K]] = {}  # layer: entries that are likely used at its next step, hence wanted

    # --- uses -----------------------------------------------------------------------------------------------------

    def begin(self, uses: Uses[K]) -> list[Entry[K, V]]:
        """A step begins: count it, use what is resident (which this returns) and want the rest until `unwant`."""
        self.policy.step(uses)
        counts = self.counts(uses.layer)
        for key in self._expected.pop(uses.layer, ()):
            self.unwant(key)
        held = []
        for key in uses.rows:
            entry = self.entries.get(key)
            if entry is not None:
                counts.saved += entry.speculation is not None
                self._use(entry)
                held.append(entry)
            self._wanted[key] = self._wanted.get(key, 0) + 1
        misses = len(uses.rows) - len(held)
        counts.hits += len(held)
        counts.misses += misses
        counts.steps += 1
        counts.clean_steps += misses == 0
        return held

    def acquire(self, key: K) -> Entry[K, V] | None:
        """Use a resident entry, within a step; None where it is absent."""
        entry = self.entries.get(key)
        if entry is not None:
            self._use(entry)
        return entry

    def release(self, entry: Entry[K, V]) -> bool:
        """End one use; whether the entry can be evicted now. Also shrinks to a budget that was lowered meanwhile."""
        entry.in_use -= 1
        assert entry.in_use >= 0, f"{entry.key} was released more often than it was leased"
        if entry.in_use == 0 and self.resident + self.reserved > self.budget:
            self._trim()
        return entry.in_use == 0

    def unwant(self, key: K) -> None:
        """A step is through with an entry."""
        left = self._wanted[key] - 1
        if left:
            self._wanted[key] = left
        else:
            del self._wanted[key]

    def expect(self, layer: int, keys: Iterable[K]) -> None:
        """Spare these, where anything else can leave, until the next step of `layer` begins."""
        for key in self._expected.pop(layer, ()):
            self.unwant(key)
        self._expected[layer] = list(keys)
        for key in self._expected[layer]:
            self._wanted[key] = self._wanted.get(key, 0) + 1

    # --- loads ----------------------------------------------------------------------------------------------------

    def reserve(self, key: K, size: int) -> bool:
        """Promise `size` bytes to a load of `key`, evicting for it; False, and no change, where too much is in use."""
        need = self.resident + self.reserved + size - self.budget
        if need > 0:
            victims = choose_victims(self.policy, key, need, sizes=self.sizes, wanted=self._wanted, keep=self._keep)
            if victims is None:
                return False
            self._drop_all(victims)
        self.reserved += size
        return True

    def reserve_spare(self, key: K, size: int, *, chance: float | None = None) -> bool:
        """`reserve`, but nothing that a step wants leaves, and with a `chance` nothing that is worth more."""
        need = self.resident + self.reserved + size - self.budget
        if need > 0:
            spared = self._wanted
            victims = self.policy.victims(key, need, lambda k: k in spared or self._keep(k), chance=chance)
            if victims is None:
                return False
            self._drop_all(victims)
        self.reserved += size
        return True

    def cancel(self, size: int) -> None:
        """Take a promise back: the load failed, or needs less from now on."""
        self.reserved -= size

    def publish(self, key: K, value: V, size: int, users: int, speculation: Speculation | None) -> Entry[K, V]:
        """Turn a promise of exactly `size` bytes into an entry that `users` leases use already."""
        assert key not in self.entries, f"{key} was loaded twice"
        self.reserved -= size
        self.resident += size
        entry = self.entries[key] = Entry(key, value, size, users, None if users else speculation)
        self.sizes[key] = size
        self.policy.loaded(key, size)
        if not users:  # the budget may have been lowered meanwhile
            self._trim()
        return entry

    # --- orders ---------------------------------------------------------------------------------------------------

    def evict(self, key: K) -> bool:
        """Drop an entry; False where it is absent, in use or pinned."""
        if key not in self.entries or self._keep(key):
            return False
        self._drop(key)
        return True

    def pin(self, key: K) -> None:
        """Never evict `key`, resident now or later."""
        self._pinned.add(key)

    def unpin(self, key: K) -> None:
        """Undo `pin`."""
        self._pinned.discard(key)
        self._trim()

    def resize(self, budget: int) -> None:
        """Set the budget. What is in use beyond it leaves when it is released."""
        self.budget = budget
        self._trim()

    def facts(self) -> Sequence[EntryFacts[K]]:
        """Every entry."""
        return [EntryFacts(e.key, e.size, e.in_use, e.key in self._pinned) for e in self.entries.values()]

    @property
    def kept(self) -> int:
        """Bytes that cannot be evicted now: in use, pinned or promised."""
        return self.reserved + sum(entry.size for key, entry in self.entries.items() if self._keep(key))

    def counts(self, group: int) -> Counts:
        """The counters of a group."""
        return self.groups.setdefault(group, Counts())

    def settle(self, speculation: Speculation, *, used: bool, hidden: float = 0.0) -> None:
        """The fate of something that was loaded on suspicion is known."""
        speculation.used, speculation.hidden = used, hidden
        counts = self.speculation
        if used:
            counts.used += 1
            counts.used_bytes += speculation.size
            counts.hidden_seconds += hidden
        else:
            counts.wasted += 1
            counts.wasted_bytes += speculation.size
        self.outcomes.append(speculation)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _use(self, entry: Entry[K, V]) -> None:
        entry.in_use += 1
        if entry.speculation is not None:
            self.settle(entry.speculation, used=True, hidden=entry.speculation.seconds)
            entry.speculation = None

    def _trim(self) -> None:
        """Get as close to the budget as what is in use allows."""
        excess = self.resident + self.reserved - self.budget
        evictable = self.resident + self.reserved - self.kept if excess > 0 else 0
        if excess > 0 and evictable > 0:
            victims = self.policy.victims(None, min(excess, evictable), self._keep)
            assert victims is not None
            self._drop_all(victims)

    def _keep(self, key: K) -> bool:
        return self.entries[key].in_use > 0 or key in self._pinned

    def _drop_all(self, victims: Iterable[K]) -> None:
        for victim in victims:
            assert not self._keep(victim), f"the policy chose {victim}, which is in use or pinned"
            self._drop(victim)

    def _drop(self, key: K) -> None:
        entry = self.entries.pop(key)
        del self.sizes[key]
        self.resident -= entry.size
        self.evictions += 1
        self.policy.evicted(key)
        if entry.speculation is not None:
            self.settle(entry.speculation, used=False)
        del entry.value  # now, not when the last thread that released it has left its frame
