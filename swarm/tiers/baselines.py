"""What a policy is compared with: least frequently used, and Belady's, which knows the future. Not for a tier."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic

from .policy import Chances, K, Uses, first_to_free

_NEVER: Final = 1 << 60


class Lfu(Generic[K]):
    """Least often used first, over all time and whether resident or not; among equals the least recently used."""

    def __init__(self) -> None:
        self._sizes: dict[K, int] = {}
        self._uses: Counter[K] = Counter()
        self._last: dict[K, int] = {}
        self._steps = 0

    def step(self, uses: Uses[K]) -> None:
        """See Policy."""
        self._steps += 1
        for key in uses.rows:
            self._uses[key] += 1
            self._last[key] = self._steps

    def forecast(self, layer: int, chances: Chances) -> None:
        """Ignored."""

    def loaded(self, key: K, size: int) -> None:
        """See Policy."""
        self._sizes[key] = size

    def evicted(self, key: K) -> None:
        """See Policy."""
        del self._sizes[key]

    def restore(self, sizes: Mapping[K, int]) -> None:
        """See Policy."""
        self._sizes = dict(sizes)

    def victims(
        self, incoming: K | None, need: int, keep: Callable[[K], bool], *, chance: float | None = None
    ) -> Sequence[K] | None:
        """See Policy; `chance` is ignored."""
        order = sorted(self._sizes, key=lambda key: (self._uses[key], self._last.get(key, 0)))
        return first_to_free({key: self._sizes[key] for key in order}, need, keep)


class Belady(Generic[K]):
    """The entry that is needed last leaves first: no policy that loads on demand hits more often.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
    `future` must be exactly the steps that follow.
    """

    def __init__(self, future: Sequence[Uses[K]]) -> None:
        self._next: list[dict[K, int]] = []  # for each step: when each of its entries is used again
        seen: dict[K, int] = {}
        for number in range(len(future) - 1, -1, -1):
            self._next.append({key: seen.get(key, _NEVER) for key in future[number].rows})
            seen.update(dict.fromkeys(future[number].rows, number))
        self._next.reverse()
        self._step = -1
        self._use: dict[K, int] = {}  # when each entry is used next
        self._sizes: dict[K, int] = {}
        self._heap: list[tuple[int, int, K]] = []  # (minus next use, tie, key); stale ones are skipped
        self._pushed = 0

    def step(self, uses: Uses[K]) -> None:
        """See Policy."""
        self._step += 1
        for key, use in self._next[self._step].items():
            self._use[key] = use
            if key in self._sizes:
                self._push(key)

    def forecast(self, layer: int, chances: Chances) -> None:
        """Ignored: it knows better."""

    def loaded(self, key: K, size: int) -> None:
        """See Policy."""
        self._sizes[key] = size
        self._push(key)

    def evicted(self, key: K) -> None:
        """See Policy."""
        del self._sizes[key]

    def restore(self, sizes: Mapping[K, int]) -> None:
        """See Policy."""
        self._sizes, self._heap = {}, []
        for key, size in sizes.items():
            self.loaded(key, size)

    def victims(
        self, incoming: K | None, need: int, keep: Callable[[K], bool], *, chance: float | None = None
    ) -> Sequence[K] | None:
        """See Policy; `chance` is ignored."""
        chosen: dict[K, None] = {}
        popped = []
        while need > 0 and self._heap:
            entry = heapq.heappop(self._heap)
            use, _, key = entry
            if key not in self._sizes or self._use[key] != -use:
                continue
            popped.append(entry)
            if key not in chosen and not keep(key):
                chosen[key] = None
                need -= self._sizes[key]
        for entry in popped:
            heapq.heappush(self._heap, entry)
        return list(chosen) if need <= 0 else None

    def _push(self, key: K) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (-self._use[key], self._pushed, key))
