"""What a tier of experts counts beside hits and misses: layer by layer, how long misses took, what they moved, and how
many calls had none.

A call is one layer's turn in one forward pass; it is fast where all of its experts are there, so the share of calls
without a miss says more about speed than the share of hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .histogram import Latencies


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer, or all of them."""

    calls: int = 0
    clean: int = 0  # calls without a miss
    loaded_bytes: int = 0
    loads: Latencies = field(default_factory=Latencies)

    @property
    def clean_share(self) -> float:
        """Calls without a miss per call; 0 where there was none."""
        return self.clean / max(1, self.calls)


@dataclass(frozen=True, slots=True)
class MeterFacts:
    """A tier at one moment."""

    every: LayerFacts = field(default_factory=LayerFacts)
    layers: Mapping[int, LayerFacts] = field(default_factory=dict)
