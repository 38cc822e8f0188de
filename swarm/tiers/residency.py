"""The bookkeeping of a tier: what is resident, reserved and in use, and what must leave. It never waits, loads, locks.

Every rule that must hold under any interleaving of threads lives here, where a test can interleave calls as it likes:
bytes resident and reserved stay within the budget; what is in use or pinned stays; a load that fails leaves no trace.
`ram.RamTier` adds the lock, the threads that wait and the loading.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .policy import Policy

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class EntryFacts(Generic[K]):
    """One resident entry as others may see it."""

    key: K
    size: int  # bytes
    uses: int  # leases since it was loaded
    in_use: int  # leases now
    pinned: bool


class Counts:
    """Hits and misses of one group; changed in place on the hot path."""

    __slots__ = ("hits", "misses")

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0


class Entry(Generic[K, V]):
    """One resident value. Whoever changes it holds the tier's lock."""

    __slots__ = ("counts", "in_use", "key", "size", "uses", "value")

    def __init__(self, key: K, value: V, size: int, in_use: int, counts: Counts) -> None:
        self.key = key
        self.value = value
        self.size = size
        self.in_use = in_use
        self.uses = in_use
        self.counts = counts


class Residency(Generic[K, V]):
    """Entries and reservations within `budget` bytes. Not thread-safe."""

    def __init__(self, budget: int, policy: Policy[K], group: Callable[[K], int] | None = None) -> None:
        self.budget = budget
        self.entries: dict[K, Entry[K, V]] = {}
        self.groups: dict[int, Counts] = {}
        self.resident = 0  # bytes
        self.reserved = 0  # bytes promised to loads in flight
        self.evictions = 0
        self._policy = policy
        self._group = group
        self._pinned: set[K] = set()

    # --- uses -----------------------------------------------------------------------------------------------------

    def acquire(self, key: K) -> Entry[K, V] | None:
        """Use a resident entry; None where it is absent, which is not counted as a miss yet."""
        entry = self.entries.get(key)
        if entry is not None:
            entry.in_use += 1
            entry.uses += 1
            entry.counts.hits += 1
            self._policy.hit(key)
        return entry

    def release(self, entry: Entry[K, V]) -> bool:
        """End one use; whether the entry can be evicted now. Also shrinks to a budget that was lowered meanwhile."""
        entry.in_use -= 1
        assert entry.in_use >= 0, f"{entry.key} was released more often than it was leased"
        if entry.in_use == 0 and self.resident + self.reserved > self.budget:
            self._trim()
        return entry.in_use == 0

    def missed(self, key: K) -> None:
        """Count a use that has to wait for a load."""
        self._counts(key).misses += 1

    # --- loads ----------------------------------------------------------------------------------------------------

    def reserve(self, key: K, size: int) -> bool:
        """Promise `size` bytes to a load of `key`, evicting for it; False, and no change, where too much is in use."""
        if not self._make_room(key, self.resident + self.reserved + size - self.budget):
            return False
        self.reserved += size
        return True

    def cancel(self, size: int) -> None:
        """Take a promise back: the load failed, or turned out to have another size."""
        self.reserved -= size

    def publish(self, key: K, value: V, size: int, users: int) -> Entry[K, V]:
        """Turn a promise of exactly `size` bytes into an entry that `users` leases use already."""
        assert key not in self.entries, f"{key} was loaded twice"
        self.reserved -= size
        self.resident += size
        entry = self.entries[key] = Entry(key, value, size, users, self._counts(key))
        self._policy.loaded(key, size)
        return entry

    # --- counts ---------------------------------------------------------------------------------------------------

    def group_of(self, key: K) -> int:
        """What a key is counted under."""
        return 0 if self._group is None else self._group(key)

    def misses(self, group: int) -> int:
        """Uses of a group that had to wait."""
        counts = self.groups.get(group)
        return 0 if counts is None else counts.misses

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
        return [EntryFacts(e.key, e.size, e.uses, e.in_use, e.key in self._pinned) for e in self.entries.values()]

    @property
    def kept(self) -> int:
        """Bytes that cannot be evicted now: in use, pinned or promised."""
        return self.reserved + sum(entry.size for key, entry in self.entries.items() if self._keep(key))

    # --- parts ----------------------------------------------------------------------------------------------------

    def _make_room(self, incoming: K | None, need: int) -> bool:
        if need <= 0:
            return True
        victims = self._policy.victims(incoming, need, self._keep)
        for victim in victims or ():
            assert not self._keep(victim), f"the policy chose {victim}, which is in use or pinned"
            self._drop(victim)
        return victims is not None

    def _trim(self) -> None:
        """Get as close to the budget as what is in use allows, oldest first."""
        excess = self.resident + self.reserved - self.budget
        evictable = self.resident + self.reserved - self.kept if excess > 0 else 0
        self._make_room(None, min(excess, evictable))

    def _keep(self, key: K) -> bool:
        return self.entries[key].in_use > 0 or key in self._pinned

    def _drop(self, key: K) -> None:
        entry = self.entries.pop(key)
        self.resident -= entry.size
        self.evictions += 1
        self._policy.evicted(key)
        del entry.value  # now, not when the last thread that released it has left its frame

    def _counts(self, key: K) -> Counts:
        return self.groups.setdefault(self.group_of(key), Counts())
