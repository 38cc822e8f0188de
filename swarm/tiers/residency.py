"""The bookkeeping of a tier: what is resident, reserved and in use, and what must leave. It never waits, loads, locks.

Every rule that must hold under any interleaving of threads lives here, where a test can interleave calls as it likes:
bytes resident and reserved stay within the budget; what is in use or pinned stays; a load that fails leaves no trace.
`ram.RamTier` adds the lock, the threads that wait and the loading.

What is in use is known by who uses it, and not by counts: a thread can be interrupted (Ctrl-C) between any two lines,
so that counts could be one too high for ever. `recover` makes all that is derived agree with what is there again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from moehive.protocol.errors import BudgetTooSmall

from .policy import Policy, Uses, choose_victims
from .stats import Counts, SpeculationCounts

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_CLEAN: Final = 256  # calls that are told of at once


@dataclass(slots=True)
class Speculation:
    """Something that was loaded before anybody needed it, and what became of it."""

    rank: int  # its place among the guesses
    size: int = 0  # bytes
    seconds: float = 0.0  # of loading
    used: bool | None = None  # None: not known yet
    hidden: float = 0.0  # seconds of loading that nobody waited for


class Entry(Generic[K, V]):
    """One resident value. Whoever changes it holds the tier's lock."""

    __slots__ = ("key", "size", "speculation", "value")

    def __init__(self, key: K, value: V, size: int, speculation: Speculation | None) -> None:
        self.key = key
        self.value = value
        self.size = size
        self.speculation = speculation  # until the first use


class Use(Generic[K, V]):
    """Some entries that a thread uses, as long as it is one of `Residency.uses`."""

    __slots__ = ("entries", "thread")

    def __init__(self, thread: int, entries: Sequence[Entry[K, V] | None] = ()) -> None:
        self.thread = thread  # whose end by an error ends it; 0: it has been handed to somebody else
        self.entries = entries  # None for what was not resident


class Residency(Generic[K, V]):
    """Entries and reservations within `budget` bytes. Not thread-safe. `dropped` is told of every value that leaves."""

    def __init__(self, budget: int, policy: Policy[K], dropped: Callable[[V], None] = lambda _: None) -> None:
        self.budget = budget
        self.entries: dict[K, Entry[K, V]] = {}
        self.sizes: dict[K, int] = {}  # of the entries
        self.uses: set[Use[K, V]] = set()
        self._groups: dict[int, Counts] = {}
        self.speculation = SpeculationCounts()
        self.outcomes: list[Speculation] = []  # whose fate became known since somebody took them
        self.resident = 0  # bytes
        self.reserved = 0  # bytes promised to loads in flight
        self.evictions = 0
        self._policy = policy
        self._clean: list[tuple[int, Sequence[K]]] = []  # calls of which neither counts nor policy have been told
        self._dropped = dropped
        self._pinned: set[K] = set()
        self._wanted: dict[K, None] = {}  # about to be used, in the order of use
        self._noted: dict[int, Iterable[K]] = {}  # layer: what it wanted last

    @property
    def policy(self) -> Policy[K]:
        """It knows of all calls so far."""
        if self._clean:
            self._tell()
        return self._policy

    @property
    def groups(self) -> Mapping[int, Counts]:
        """The counters of every group that was used or loaded."""
        if self._clean:
            self._tell()
        return self._groups

    # --- uses -----------------------------------------------------------------------------------------------------

    def note(self, uses: Uses[K], *, want: bool = True) -> list[K]:
        """Count what a layer's call is about to use; returns what is absent. The hot path.

        Where something is absent, with `want` all of it is spared, where anything else can leave, until it was used.
        """
        layer, entries = uses.layer, self.entries
        if layer in self._noted:
            self._unwant(self._noted.pop(layer))
        missing = [key for key in uses.rows if key not in entries]
        counts = self._count(uses, len(missing))
        if missing and want:
            self.want(layer, uses.rows)
        if self.speculation.pending:
            self._settle_hits(uses, counts)
        return missing

    def hold(self, layer: int, keys: Sequence[K], thread: int) -> Use[K, V] | None:
        """`note` and `acquire` in one step for a call of one token that finds all of `keys`. The hottest path.

        None, and no change, where it does not, or where something was spared or loaded on suspicion for some call.
        Counts and policy are told later, of many calls at once: with all experts resident they are all that this costs,
        and between the products of a model their code and data are never in the processor's cache.
        """
        if self._noted or self.speculation.pending:
            return None
        held: list[Entry[K, V]] = []
        entries = self.entries
        for key in keys:
            entry = entries.get(key)
            if entry is None:
                return None
            held.append(entry)
        use = Use(thread, held)
        self.uses.add(use)
        self._clean.append((layer, keys))
        if len(self._clean) == _CLEAN:
            self._tell()
        return use

    def want(self, layer: int, keys: Iterable[K]) -> None:
        """Spare these, where anything else can leave, until they were used or the next call of `layer` is noted."""
        if layer in self._noted:
            self._unwant(self._noted[layer])
        self._noted[layer] = keys
        self._wanted.update(dict.fromkeys(keys))

    def acquire(self, keys: Iterable[K], use: Use[K, V]) -> bool:
        """Begin `use` with those of `keys` that are resident; whether one is. The hot path."""
        use.entries = held = [self.entries.get(key) for key in keys]
        self.uses.add(use)
        found = False
        for entry in held:
            if entry is not None:
                found = True
                if entry.speculation is not None:
                    self._settle_use(entry)
        if not found:
            self.uses.discard(use)
        return found

    def release(self, use: Use[K, V]) -> None:
        """End a use, if it has not ended. Also shrinks to a budget that was lowered meanwhile. The hot path."""
        self.uses.discard(use)
        if self._wanted:
            self._unwant(entry.key for entry in use.entries if entry is not None)
        if self.resident + self.reserved > self.budget:
            self._trim()

    # --- loads ----------------------------------------------------------------------------------------------------

    def reserve(self, key: K | None, size: int) -> bool:
        """Promise `size` bytes to a load of `key`, evicting for it; False, and no change, where too much is in use.

        None: to something that will not be an entry.
        """
        need = self.resident + self.reserved + size - self.budget
        if need > 0:
            keep = self._kept_keys().__contains__
            victims = choose_victims(self.policy, key, need, sizes=self.sizes, wanted=self._wanted, keep=keep)
            if victims is None:
                return False
            self._drop_all(victims)
        self.reserved += size
        return True

    def reserve_spare(self, key: K, size: int, *, chance: float | None = None) -> bool:
        """`reserve`, but nothing that is wanted leaves, and with a `chance` nothing that is worth more."""
        need = self.resident + self.reserved + size - self.budget
        if need > 0:
            keep = {*self._wanted, *self._kept_keys()}.__contains__
            victims = self.policy.victims(key, need, keep, chance=chance)
            if victims is None:
                return False
            self._drop_all(victims)
        self.reserved += size
        return True

    def cancel(self, size: int) -> None:
        """Take a promise back: the load failed, or needs less from now on."""
        self.reserved -= size

    def publish(
        self, key: K, value: V, size: int, users: Sequence[Use[K, V]] = (), speculation: Speculation | None = None
    ) -> Entry[K, V]:
        """Turn a promise of exactly `size` bytes into an entry that is used by `users` already."""
        assert key not in self.entries, f"{key} was loaded twice"
        entry = Entry(key, value, size, None if users else speculation)
        for use in users:
            use.entries = (entry,)
        self.uses.update(users)
        self.reserved -= size
        self.resident += size
        self.entries[key] = entry
        self.sizes[key] = size
        self.policy.loaded(key, size)
        if entry.speculation is not None:
            self.speculation.pending += 1
        if not users:  # the budget may have been lowered meanwhile
            self._trim()
        return entry

    # --- orders ---------------------------------------------------------------------------------------------------

    def evict(self, key: K) -> bool:
        """Drop an entry; False where it is absent, in use or pinned."""
        if key not in self.entries or key in self._kept_keys():
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

    def recover(self, thread: int, reserved: int) -> None:
        """End all uses of a thread that was interrupted, perhaps in the middle of any of these methods.

        `reserved` is what is promised to those that still load. Everything else is derived from the entries anew.
        """
        self.uses = {use for use in self.uses if use.thread != thread}
        self.sizes = {key: entry.size for key, entry in self.entries.items()}
        self.resident, self.reserved = sum(self.sizes.values()), reserved
        self.speculation.pending = sum(entry.speculation is not None for entry in self.entries.values())
        noted = {key for keys in self._noted.values() for key in keys}
        self._wanted = {key: None for key in self._wanted if key in noted}
        self.policy.restore(self.sizes)
        self._trim()

    @property
    def kept(self) -> int:
        """Bytes that cannot be evicted now: in use, pinned or promised."""
        return self.reserved + sum(self.sizes[key] for key in self._kept_keys() if key in self.sizes)

    @property
    def excess(self) -> int:
        """Bytes beyond a budget that was lowered, which leave when they are released."""
        return max(0, self.resident + self.reserved - self.budget)

    def refusal(self, what: str, size: int) -> BudgetTooSmall:
        """Why `size` bytes cannot be had, and the budget that would do."""
        if size > self.budget:
            return BudgetTooSmall(what, budget=self.budget, needed=size)
        return BudgetTooSmall(f"{what} beside all that is in use", budget=self.budget, needed=self.kept + size)

    def counts(self, group: int) -> Counts:
        """The counters of a group."""
        counts = self.groups.get(group)
        if counts is None:
            counts = self._groups[group] = Counts()
        return counts

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

    def _tell(self) -> None:
        """Tell counts and policy of the calls that found everything."""
        clean, self._clean = self._clean, []
        for layer, keys in clean:
            self._count(Uses(layer, dict.fromkeys(keys, 1)), 0)

    def _count(self, uses: Uses[K], missing: int) -> Counts:
        """Tell counts and policy of a call, of whose entries so many were absent; the counts of its layer."""
        self.policy.step(uses)
        counts = self.counts(uses.layer)
        counts.steps += 1
        counts.hits += len(uses.rows) - missing
        counts.misses += missing
        counts.clean_steps += not missing
        return counts

    def _settle_hits(self, uses: Uses[K], counts: Counts) -> None:
        """Of what a call uses, see what was loaded for it on suspicion."""
        for key in uses.rows:
            entry = self.entries.get(key)
            if entry is not None and entry.speculation is not None:
                counts.saved += 1
                self._settle_use(entry)

    def _settle_use(self, entry: Entry[K, V]) -> None:
        assert entry.speculation is not None
        self.speculation.pending -= 1
        self.settle(entry.speculation, used=True, hidden=entry.speculation.seconds)
        entry.speculation = None

    def _unwant(self, keys: Iterable[K]) -> None:
        for key in keys:
            self._wanted.pop(key, None)

    def _trim(self) -> None:
        """Get as close to the budget as what is in use allows."""
        excess = self.excess
        evictable = self.resident + self.reserved - self.kept if excess else 0
        if evictable > 0:
            victims = self.policy.victims(None, min(excess, evictable), self._kept_keys().__contains__)
            assert victims is not None
            self._drop_all(victims)

    def _kept_keys(self) -> set[K]:
        """What is in use or pinned."""
        kept = {entry.key for use in self.uses for entry in use.entries if entry is not None}
        return kept | self._pinned if self._pinned else kept

    def _drop_all(self, victims: Sequence[K]) -> None:
        kept = self._kept_keys().intersection(victims)
        assert not kept, f"the policy chose {kept}, in use or pinned"
        for victim in victims:
            self._drop(victim)

    def _drop(self, key: K) -> None:
        entry = self.entries[key]
        self.policy.evicted(key)
        del self.entries[key], self.sizes[key]
        self.resident -= entry.size
        self.evictions += 1
        if entry.speculation is not None:
            self.speculation.pending -= 1
            self.settle(entry.speculation, used=False)
        self._dropped(entry.value)
        del entry.value  # now, not when the last thread that released it has left its frame
