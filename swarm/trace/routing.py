"""A routing trace in memory: the experts of every token and layer of some runs, and hidden states of some tokens.

Token rows are in the order in which they were computed: call after call (a call is one forward pass of some tokens),
session after session (a session begins with a prompt). N tokens, L layers with routed experts, K experts per token, E
experts per layer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moehive.protocol.errors import TraceError
from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.policy import Uses


@dataclass(frozen=True, slots=True, eq=False)
class HiddenSamples:
    """Hidden states of some tokens, for fitting predictors."""

    rows: NDArray[np.int64]  # [M]: their token rows, ascending
    inputs: NDArray[np.float16]  # [M, L, H]: what the router and the experts of each layer get
    residuals: NDArray[np.float16]  # [M, L, H]: what enters each decoder layer, divided by its root mean square


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """See the module. Raises TraceError where the parts contradict each other."""

    model: str  # model id, or what it imitates
    layers: tuple[int, ...]  # decoder layers with routed experts, ascending
    num_experts: int
    tokens: NDArray[np.int32]  # [C]: tokens of each call
    starts: NDArray[np.bool_]  # [C]: whether a session begins with it
    experts: NDArray[np.uint16]  # [N, L, K]
    samples: HiddenSamples | None = None

    def __post_init__(self) -> None:
        count = self.experts.shape[0]
        facts = {
            "its calls have other tokens": int(self.tokens.sum()) == count and bool((self.tokens > 0).all()),
            "its starts are not one for each call": self.starts.shape == self.tokens.shape,
            "its experts are not [tokens, layers, top k]": self.experts.shape[1:2] == (len(self.layers),),
            "it does not begin with a session": len(self.starts) == 0 or bool(self.starts[0]),
            "it has experts that the model has not": count == 0 or int(self.experts.max()) < self.num_experts,
            "its samples are of tokens it has not": self.samples is None or _within(self.samples, count, self.layers),
        }
        for fault, right in facts.items():
            if not right:
                raise TraceError(f"the trace contradicts itself: {fault}")

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.experts.shape[2])

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.experts.shape[0])

    def steps(self) -> Iterator[Uses[ExpertKey]]:
        """Each layer's part of each call, in the order of computation."""
        end = 0
        for tokens in self.tokens.tolist():
            start, end = end, end + tokens
            for column, layer in enumerate(self.layers):
                yield _uses(layer, self.experts[start:end, column])


def _uses(layer: int, chosen: NDArray[np.uint16]) -> Uses[ExpertKey]:
    """What a call of a layer uses, with `chosen` [T, K]; experts ascending, as they are computed."""
    if len(chosen) == 1:
        return Uses(layer, {ExpertKey(layer, expert): 1 for expert in sorted(chosen[0].tolist())})
    experts, rows = np.unique(chosen, return_counts=True)
    counts = zip(experts.tolist(), rows.tolist(), strict=True)
    return Uses(layer, {ExpertKey(layer, expert): count for expert, count in counts}, len(chosen))


def _within(samples: HiddenSamples, tokens: int, layers: tuple[int, ...]) -> bool:
    rows, shape = samples.rows, samples.inputs.shape
    ordered = rows.ndim == 1 and (
        len(rows) == 0 or (rows[0] >= 0 and rows[-1] < tokens and bool((np.diff(rows) > 0).all()))
    )
    return ordered and len(shape) == 3 and shape[:2] == (len(rows), len(layers)) and samples.residuals.shape == shape
