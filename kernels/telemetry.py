"""How evenly experts are used: counts, and what is read from them.

Counting is cheap enough to be always on; the statistics are made when somebody asks. Owns no clock and no export.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """The use of one layer's experts. All ratios are 0 (coefficient and peak: 1) while nothing was counted.

    counts: how often each expert was chosen. dropped: choices that were left out, by capacity or a mask.
    utilisation: share of the experts that were chosen at all. gini: 0 when all are chosen equally often, (E - 1) / E
    when one expert takes everything. load_balance: 1 + standard deviation / mean of the counts, 1 when they are equal.
    peak: the most used expert's count over the mean.
    """

    counts: tuple[int, ...]
    dropped: int
    utilisation: float
    gini: float
    load_balance: float
    peak: float

    @classmethod
    def of(cls, counts: Sequence[int], dropped: int = 0) -> LoadStatistics:
        """The statistics of `counts`, one for each expert."""
        tensor = torch.tensor(counts, dtype=torch.float64)
        mean = float(tensor.mean())
        return cls(
            tuple(counts),
            dropped,
            utilisation=float((tensor > 0).double().mean()),
            gini=gini_coefficient(tensor),
            load_balance=load_balance_coefficient(tensor),
            peak=float(tensor.max()) / mean if mean else 1.0,
        )


def gini_coefficient(counts: Tensor) -> float:
    """Mean absolute difference between experts over twice the mean: counts [E] -> 0 (even) to (E - 1) / E."""
    ordered = counts.double().sort().values  # [E]
    total, size = float(ordered.sum()), ordered.shape[0]
    rank = torch.arange(1, size + 1, dtype=torch.float64, device=counts.device)  # [E]
    return float((2 * rank - size - 1) @ ordered) / (size * total) if total else 0.0


def load_balance_coefficient(counts: Tensor) -> float:
    """1 + standard deviation / mean: counts [E] -> 1 when even."""
    counts = counts.double()
    mean = float(counts.mean())
    return 1.0 + float(counts.std(correction=0)) / mean if mean else 1.0


class RoutingTelemetry:
    """Counts of the choices of each layer of one model. Any thread may count and ask."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._layers: dict[int, list[int]] = {}  # [E] choices, then those that were left out
        self._lock = threading.Lock()

    def count(self, layer: int, chosen: Iterable[tuple[int, int]]) -> None:
        """Add one call's (expert, how often) pairs. The expert `num_experts` stands for choices that were left out."""
        with self._lock:
            counts = self._layers.get(layer) or self._layers.setdefault(layer, [0] * (self.num_experts + 1))
            for expert, times in chosen:
                counts[expert] += times

    def layers(self) -> dict[int, LoadStatistics]:
        """The statistics of every layer that was called, ascending."""
        with self._lock:
            counts = {layer: list(found) for layer, found in sorted(self._layers.items())}
        return {layer: LoadStatistics.of(found[:-1], found[-1]) for layer, found in counts.items()}

    def total(self) -> LoadStatistics:
        """The statistics of all layers together: expert e of every layer counts as one."""
        with self._lock:
            columns = zip(*self._layers.values(), strict=True)
            counts = [sum(column) for column in columns] or [0] * (self.num_experts + 1)
        return LoadStatistics.of(counts[:-1], counts[-1])
