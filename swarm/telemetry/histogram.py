"""Latencies in fixed logarithmic buckets: adding one costs a list index and keeps nothing, however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import frexp
from typing import Final

_FIRST: Final = 1e-6  # seconds; everything below is one bucket
_STEPS: Final = 4  # buckets in each doubling: a quantile is told up to 25 % too large, never too small
_DOUBLINGS: Final = 30  # up to 18 minutes; everything above is in the last bucket
_BUCKETS: Final = _STEPS * _DOUBLINGS


@dataclass(frozen=True, slots=True)
class Latencies:
    """What a histogram holds, in seconds; all 0 while it is empty. Quantiles are upper bounds, at most 25 % off."""

    count: int = 0
    total: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    slowest: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds."""
        return self.total / max(1, self.count)


class Histogram:
    """Counts seconds. Not thread-safe: whoever adds holds the lock of what is measured."""

    __slots__ = ("_counts", "count", "slowest", "total")

    def __init__(self) -> None:
        self._counts = [0] * (_BUCKETS + 1)
        self.count = 0
        self.total = 0.0  # seconds
        self.slowest = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        part, doubling = frexp(seconds / _FIRST)  # seconds / _FIRST = part * 2**doubling, part in [1/2, 1)
        index = _STEPS * (doubling - 1) + int((2 * part - 1) * _STEPS)
        self._counts[0 if index < 0 or doubling < 1 else min(index, _BUCKETS)] += 1
        self.count += 1
        self.total += seconds
        if seconds > self.slowest:
            self.slowest = seconds

    def quantile(self, share: float) -> float:
        """Seconds that `share` of all do not exceed: the end of their bucket, but not more than the slowest one."""
        left = share * self.count
        for index, count in enumerate(self._counts):
            left -= count
            if left <= 0:
                return min(_end_of(index), self.slowest)
        return self.slowest

    def below(self, doublings: Sequence[int]) -> list[int]:
        """How many were shorter than 1 us * 2**doubling, for each of `doublings` (0 to 30): these are exact."""
        return [sum(self._counts[: _STEPS * doubling]) for doubling in doublings]

    def copy(self) -> Histogram:
        """One that nobody adds to."""
        return merged([self])

    @property
    def latencies(self) -> Latencies:
        """The state now."""
        if not self.count:
            return Latencies()
        return Latencies(self.count, self.total, self.quantile(0.5), self.quantile(0.99), self.slowest)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """One that holds what all of them hold."""
    out = Histogram()
    for histogram in histograms:
        out._counts = [a + b for a, b in zip(out._counts, histogram._counts, strict=True)]
        out.count += histogram.count
        out.total += histogram.total
        out.slowest = max(out.slowest, histogram.slowest)
    return out


def _end_of(index: int) -> float:
    """The upper end of a bucket, in seconds; the last one has none."""
    if index >= _BUCKETS:
        return float("inf")
    doubling, step = divmod(index, _STEPS)
    return float(_FIRST * 2.0**doubling * (1 + (step + 1) / _STEPS))
