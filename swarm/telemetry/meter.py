"""What a tier of experts counts beside hits and misses: layer by layer, how long misses took, what they moved, and how
many calls had none.

A call is one layer's turn in one forward pass; it is fast where all of its experts are there, so the share of calls
without a miss says more about speed than the share of hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .histogram import Histogram, Latencies, merged


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
    """A meter at one moment."""

    every: LayerFacts = field(default_factory=LayerFacts)
    layers: Mapping[int, LayerFacts] = field(default_factory=dict)


class _Layer:
    __slots__ = ("bytes", "calls", "clean", "loads", "misses")

    def __init__(self) -> None:
        self.calls = self.clean = self.bytes = 0
        self.misses = 0  # at the end of the last call
        self.loads = Histogram()

    @property
    def facts(self) -> LayerFacts:
        return LayerFacts(self.calls, self.clean, self.bytes, self.loads.latencies)


class Meter:
    """Not thread-safe: its tier's lock is held."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def loaded(self, layer: int, seconds: float, nbytes: int) -> None:
        """An expert came from the next tier."""
        counts = self._of(layer)
        counts.loads.add(seconds)
        counts.bytes += nbytes

    def called(self, layer: int, misses: int) -> None:
        """A call of a layer ended, which has had `misses` in all. Calls at the same time share each other's misses."""
        counts = self._of(layer)
        counts.calls += 1
        counts.clean += misses == counts.misses
        counts.misses = misses

    @property
    def facts(self) -> MeterFacts:
        """A snapshot."""
        layers = {layer: self._layers[layer] for layer in sorted(self._layers)}
        every = LayerFacts(
            sum(one.calls for one in layers.values()),
            sum(one.clean for one in layers.values()),
            sum(one.bytes for one in layers.values()),
            merged(one.loads for one in layers.values()).latencies,
        )
        return MeterFacts(every, {layer: one.facts for layer, one in layers.items()})

    def _of(self, layer: int) -> _Layer:
        counts = self._layers.get(layer)
        if counts is None:
            counts = self._layers[layer] = _Layer()
        return counts
