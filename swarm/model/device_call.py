"""One call of a layer whose experts are partly on an accelerator: what is computed where, and its inputs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

PROCESSOR: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class CallPlan:
    """Where the experts of one call of one layer are computed."""

    layer: int
    dtype: torch.dtype
    rows: Mapping[int, int]  # of each expert
    processor: frozenset[int]  # experts that the processor computes
    awaited: Sequence[int]  # experts that are uploaded for this call

    @property
    def order(self) -> Sequence[int]:
        """What is resident, what the processor computes while the device and its link are busy, what is to come."""
        late = frozenset(self.awaited)
        rank = {expert: (expert in late, expert in self.processor) for expert in self.rows}
        return sorted(self.rows, key=rank.__getitem__)


class WeightedRows(NamedTuple):
    """The rows of one expert, on the processor."""

    expert: int
    token: Tensor  # [R] int64
    weight: Tensor  # [R] floating


class CallInputs:
    """A call's hidden states [T, H] where they are needed. Brought to the processor before the device is kept busy."""

    def __init__(self, hidden: Tensor, plan: CallPlan) -> None:
        self.hidden = hidden
        self.device = hidden.device
        self._there = {hidden.device: hidden}
        if plan.processor:
            self.on(PROCESSOR)

    def on(self, device: torch.device) -> Tensor:
        """On `device`."""
        found = self._there.get(device)
        if found is None:
            found = self._there[device] = self._there[self.device].to(device)
        return found
