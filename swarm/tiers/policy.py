"""What a tier evicts: policies that are functions of the events they were told, and of nothing else.

A policy is a state machine. Its only inputs are `loaded`, `hit` and `evicted`; it has no clock (time is the number of
events), no randomness of its own, no I/O, and never sees a value. So the same events always give the same decisions: a
recorded trace can be replayed against any policy (`replay`), and a tier's decisions against it. State advances in place
rather than by copies because a hit is told top_k times per layer and token; it has to cost well under a microsecond.

Everything in caching practice that the interface was checked against is expressible: decayed frequency (counted in
`hit` and `loaded`), per-layer floors (`victims` knows what comes in), pins (`keep`), ghost lists (remembered in
`evicted`, looked up in `loaded`). Admission needs no call of its own: what is loaded is about to be used and needs its
bytes either way, so refusing a newcomer means putting it first in line for eviction, which `loaded` can do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class Policy(Protocol[K]):
    """Decides the order of eviction among the entries it was told of."""

    def loaded(self, key: K, size: int) -> None:
        """`key` became resident, with `size` bytes, and was used."""

    def hit(self, key: K) -> None:
        """A resident `key` was used. The hot path."""

    def evicted(self, key: K) -> None:
        """`key` left, by this policy's decision or by somebody's order."""

    def victims(self, incoming: K | None, need: int, keep: Callable[[K], bool]) -> Sequence[K] | None:
        """Entries to evict, first to go first, to free at least `need` bytes for `incoming` (None: the budget shrank).

        None of them satisfies `keep`. None where that cannot be done; the state does not change either way.
        """


class Lru(Generic[K]):
    """Least recently used first: O(1) per hit, O(victims + entries kept among the oldest) per decision."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[K, int] = OrderedDict()  # oldest first
        self.hit: Callable[[K], None] = self._sizes.move_to_end

    def loaded(self, key: K, size: int) -> None:
        """See Policy."""
        self._sizes[key] = size
        self._sizes.move_to_end(key)

    def evicted(self, key: K) -> None:
        """See Policy."""
        del self._sizes[key]

    def victims(self, incoming: K | None, need: int, keep: Callable[[K], bool]) -> Sequence[K] | None:
        """See Policy."""
        chosen: list[K] = []
        for key, size in self._sizes.items():
            if need <= 0:
                break
            if not keep(key):
                chosen.append(key)
                need -= size
        return chosen if need <= 0 else None


@dataclass(frozen=True, slots=True)
class Replay:
    """What a policy made of a trace."""

    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 for an empty trace."""
        return self.hits / max(1, self.hits + self.misses)


def replay(policy: Policy[K], trace: Iterable[K], sizes: Mapping[K, int], budget: int) -> Replay:
    """Run a trace of uses, one at a time, through a fresh policy and a budget of bytes; pure but for `policy`.

    Every entry must fit the budget alone.
    """
    resident: set[K] = set()
    used = hits = misses = evictions = 0
    for key in trace:
        if key in resident:
            hits += 1
            policy.hit(key)
            continue
        misses += 1
        victims = policy.victims(key, used + sizes[key] - budget, lambda _: False)
        assert victims is not None, f"{key} of {sizes[key]} bytes in a budget of {budget}"
        for victim in victims:
            evictions += 1
            resident.remove(victim)
            used -= sizes[victim]
            policy.evicted(victim)
        resident.add(key)
        used += sizes[key]
        policy.loaded(key, sizes[key])
    return Replay(hits, misses, evictions)
