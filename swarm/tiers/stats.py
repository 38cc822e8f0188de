"""What a tier counts: plain numbers, as snapshots that nobody else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moehive.swarm.telemetry.meter import MeterFacts


@dataclass(frozen=True, slots=True)
class HitCounts:
    """Uses of one group of keys, such as one layer's experts."""

    hits: int
    misses: int  # uses that had to wait for a load, started or joined

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.hits / max(1, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier since it was made. hits + misses = uses; loads = misses that did not join another's load."""

    budget_bytes: int
    resident_bytes: int
    reserved_bytes: int  # for loads in flight
    entries: int
    hits: int
    misses: int
    loads: int
    failed_loads: int
    evictions: int
    loaded_bytes: int
    load_seconds: float  # sum over successful loads
    slowest_load: float  # seconds
    groups: Mapping[int, HitCounts]
    meter: MeterFacts = field(default_factory=MeterFacts)  # times, bytes and calls, layer by layer

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 where there was none."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def mean_load(self) -> float:
        """Seconds per successful load."""
        return self.load_seconds / max(1, self.loads - self.failed_loads)
