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


class LayerLoad:
    """Counts the choices of one layer. Any thread may count and ask."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts = [0] * (num_experts + 1)  # the last one: choices that were left out
        self._on_device: dict[torch.device, Tensor] = {}  # [E] each
        self._lock = threading.Lock()

    def count(self, experts: Tensor) -> None:
        """Add one call's choices, experts [T, K]; the id `num_experts` stands for a choice that was left out.

        Waits for the GPU where they are there: kernels count into `on(device)` instead.
        """
        if experts.shape[0] == 1:  # decoding: K numbers are faster than a histogram
            chosen: Iterable[tuple[int, int]] = ((expert, 1) for expert in experts[0].tolist())
        else:
            chosen = enumerate(torch.bincount(experts.reshape(-1), minlength=self.num_experts + 1).tolist())
        with self._lock:
            for expert, times in chosen:
                self._counts[expert] += times

    def on(self, device: torch.device) -> Tensor:
        """The counter [E] int64 that kernels on `device` add to (`usage` of `kernels.gpu.align.align_rows`)."""
        with self._lock:
            if device not in self._on_device:
                self._on_device[device] = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
            return self._on_device[device]

    def statistics(self) -> LoadStatistics:
        """What was counted so far, everywhere."""
        with self._lock:
            counts, dropped = self._counts[:-1], self._counts[-1]
            for counter in self._on_device.values():
                counts = [a + b for a, b in zip(counts, counter.tolist(), strict=True)]
        return LoadStatistics.of(counts, dropped)
