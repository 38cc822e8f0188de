"""What a tier counts: while it works (changed in place, under the tier's lock) and as snapshots nobody else changes.

A use is one entry of one step, a step one call of a layer. It hits where the entry is resident when the step begins,
else it misses and waits for a load, its own or one under way. A step is clean when all its uses hit. Speculation is
what was loaded before anybody needed it; a use that hits because of it is also counted as saved, so that the rates with
and without can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

_BUCKETS: Final = 28  # of durations: below 2 us, 4 us, ... and everything from 134 s on
_SHORTEST: Final = 1e-6


class Durations:
    """A histogram of seconds in powers of two: 28 numbers, whatever is added."""

    __slots__ = ("counts", "slowest", "total")

    def __init__(self, counts: Sequence[int] = (0,) * _BUCKETS, total: float = 0.0, slowest: float = 0.0) -> None:
        self.counts = list(counts)
        self.total = total  # seconds
        self.slowest = slowest

    def add(self, seconds: float) -> None:
        """Count one."""
        bucket = int(seconds / _SHORTEST).bit_length() - 1
        self.counts[min(max(bucket, 0), _BUCKETS - 1)] += 1
        self.total += seconds
        self.slowest = max(self.slowest, seconds)

    def copy(self) -> Durations:
        """A snapshot."""
        return Durations(self.counts, self.total, self.slowest)

    def __add__(self, other: Durations) -> Durations:
        counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        return Durations(counts, self.total + other.total, max(self.slowest, other.slowest))

    @property
    def count(self) -> int:
        """How many were added."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Seconds; 0 where there are none."""
        return self.total / max(1, self.count)

    def percentile(self, share: float) -> float:
        """Seconds that `share` of them do not exceed: the upper end of a bucket, hence up to twice the truth."""
        left = share * self.count
        for bucket, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                return min(_SHORTEST * 2 ** (bucket + 1), self.slowest)
        return 0.0


@dataclass(slots=True)
class Counts:
    """One group of keys, such as one layer's experts."""

    hits: int = 0
    misses: int = 0
    saved: int = 0  # hits that speculation made
    late: int = 0  # misses whose entry speculation had begun to load
    steps: int = 0
    clean_steps: int = 0
    loads: Durations = field(default_factory=Durations)  # from the file to a usable value, whoever wanted it
    stalls: Durations = field(default_factory=Durations)  # that steps waited, for one entry each

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def clean_share(self) -> float:
        """Steps without a miss, per step; 0 where there was none."""
        return self.clean_steps / max(1, self.steps)

    def copy(self) -> Counts:
        """A snapshot."""
        return replace(self, loads=self.loads.copy(), stalls=self.stalls.copy())

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.hits + other.hits,
            self.misses + other.misses,
            self.saved + other.saved,
            self.late + other.late,
            self.steps + other.steps,
            self.clean_steps + other.clean_steps,
            self.loads + other.loads,
            self.stalls + other.stalls,
        )


@dataclass(slots=True)
class SpeculationCounts:
    """What was loaded before anybody needed it."""

    loads: int = 0
    bytes: int = 0
    used: int = 0  # of the loads, entries that were used before they left
    used_bytes: int = 0
    wasted: int = 0  # entries that left without having been used
    wasted_bytes: int = 0
    cancelled: int = 0  # not begun when it became clear that they were not needed
    pending: int = 0  # resident entries that nobody used so far
    hidden_seconds: float = 0.0  # of loading that no step had to wait for

    @property
    def wasted_share(self) -> float:
        """Bytes wasted, of all whose fate is known; 0 where there are none."""
        return self.wasted_bytes / max(1, self.wasted_bytes + self.used_bytes)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier since it was made."""

    name: str
    budget_bytes: int
    resident_bytes: int
    reserved_bytes: int  # for loads in flight
    entries: int
    loaded_bytes: int
    failed_loads: int
    evictions: int
    shrinks: int  # how often the budget was lowered because the machine had no memory
    speculation: SpeculationCounts
    groups: Mapping[int, Counts]

    @property
    def total(self) -> Counts:
        """All groups together."""
        return sum(self.groups.values(), Counts())

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.total.hit_rate
