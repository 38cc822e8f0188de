"""What a tier counts: while it works (changed in place, under the tier's lock) and as snapshots nobody else changes.

A use is one entry of one call of a layer. It hits where the entry is resident when the call begins, else it misses and
waits for a load, its own or one under way. A call is clean when all its uses hit. Speculation is what was loaded before
anybody needed it; a use that hits because of it is also counted as saved, so that the rates with and without can be
told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moehive.swarm.telemetry.histogram import Histogram, merged
from moehive.swarm.telemetry.meter import LayerFacts, MeterFacts


@dataclass(slots=True)
class Counts:
    """One group of keys, such as one layer's experts."""

    hits: int = 0
    misses: int = 0
    saved: int = 0  # hits that speculation made
    late: int = 0  # misses whose entry speculation had begun to load
    steps: int = 0  # calls
    clean_steps: int = 0
    loaded_bytes: int = 0
    loads: Histogram = field(default_factory=Histogram)  # seconds to a usable value, whoever wanted it
    stalls: Histogram = field(default_factory=Histogram)  # seconds that calls waited, for one entry each

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def clean_share(self) -> float:
        """Calls without a miss, per call; 0 where there was none."""
        return self.clean_steps / max(1, self.steps)

    @property
    def facts(self) -> LayerFacts:
        """What telemetry shows of it."""
        return LayerFacts(self.steps, self.clean_steps, self.loaded_bytes, self.loads.latencies)

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
            self.loaded_bytes + other.loaded_bytes,
            merged([self.loads, other.loads]),
            merged([self.stalls, other.stalls]),
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
    hidden_seconds: float = 0.0  # of loading that no call had to wait for

    @property
    def wasted_share(self) -> float:
        """Bytes wasted, of all whose fate is known; 0 where there are none."""
        return self.wasted_bytes / max(1, self.wasted_bytes + self.used_bytes)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier since it was made. hits + misses = uses; loads = misses that did not join another's load, and prefetch."""

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
    def hits(self) -> int:
        """Of all groups."""
        return sum(counts.hits for counts in self.groups.values())

    @property
    def misses(self) -> int:
        """Of all groups."""
        return sum(counts.misses for counts in self.groups.values())

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def loads(self) -> int:
        """Begun and ended, failed ones included."""
        return self.failed_loads + sum(counts.loads.count for counts in self.groups.values())

    @property
    def load_seconds(self) -> float:
        """Sum over successful loads."""
        return sum(counts.loads.total for counts in self.groups.values())

    @property
    def slowest_load(self) -> float:
        """Seconds."""
        return max((counts.loads.slowest for counts in self.groups.values()), default=0.0)

    @property
    def meter(self) -> MeterFacts:
        """Times, bytes and calls, layer by layer."""
        return MeterFacts(self.total.facts, {layer: self.groups[layer].facts for layer in sorted(self.groups)})
