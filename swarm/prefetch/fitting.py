"""Fitting linear predictors to a trace with hidden states: ridge regression on the router's logits.

Logits rather than the chosen experts, because they also say how near the others were: on the demo model's traces it is
worth two to four points of recall. The solution is exact and deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moehive.protocol.errors import TraceError
from moehive.swarm.trace.routing import RoutingTrace

from .history import Floats, histories
from .predictors import LinearMap, Maps, Point, Predictor

RIDGE: Final = 1e-3  # added to each feature's mean square, which is about 1
_CHUNK: Final = 4096  # tokens whose features exist at a time


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """A layer's router: logits = hidden @ weight.T + offset, of the hidden state that its experts get.

    weight: [E, H] float32. offset: [E] float32. gain: [H] float32, of the norm before it. correction: see LinearMap.
    """

    weight: Floats
    offset: Floats
    gain: Floats
    correction: Floats | None = None

    def logits(self, inputs: Floats) -> Floats:
        """[T, H] to [T, E]."""
        result: Floats = inputs @ self.weight.T + self.offset
        return result


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Hidden states of consecutive tokens.

    inputs: [T, L, H], of each layer's router and experts. residuals: [T, L, H], what enters each decoder layer, divided
    by its root mean square. starts: [T], where a session begins.
    """

    inputs: NDArray[np.floating[Any]]
    residuals: NDArray[np.floating[Any]]
    starts: NDArray[np.bool_]

    def at(self, point: Point, column: int) -> Floats | None:
        """The states [T, H] that a guess of the layer in `column` is made from; None where there are none."""
        if point is Point.ENTRY:
            return self.residuals[:, column].astype(np.float32)
        return self.inputs[:, column - point.ahead].astype(np.float32) if column >= point.ahead else None


def states_of(trace: RoutingTrace) -> tuple[States, NDArray[np.integer[Any]]]:
    """The tokens of a trace with hidden states, and the experts that they use, [T, L, K]. Raises TraceError."""
    if trace.samples is None or not len(trace.samples.rows):
        raise TraceError("the trace has no hidden states; moehive trace record keeps them with --samples")
    rows = trace.samples.rows
    sessions = np.zeros(trace.count, np.bool_)
    sessions[(np.cumsum(trace.tokens) - trace.tokens)[trace.starts]] = True
    starts = sessions[rows] | np.concatenate(([True], np.diff(rows) != 1))
    return States(trace.samples.inputs, trace.samples.residuals, starts), trace.experts[rows]


def untrained(routers: Mapping[int, Router]) -> Maps:
    """Each layer's own router, at every point: its norm in place of the one that the state has gone through."""
    maps: dict[tuple[Point, int], LinearMap] = {}
    ordered = sorted(routers.items())
    for column, (layer, router) in enumerate(ordered):
        plain = (router.weight * router.gain).T  # [H, E]
        for point in Point:
            if point is Point.ENTRY:
                weight = plain
            elif column >= point.ahead:
                weight = plain / _safe(ordered[column - point.ahead][1].gain)[:, None]
            else:
                continue
            maps[point, layer] = LinearMap(weight, router.offset, router.correction)
    return maps


def by_routers(routers: Mapping[int, Router], top_k: int) -> Predictor:
    """The predictor that needs no training."""
    return Predictor(untrained(routers), top_k, next(iter(routers.values())).weight.shape[1])


def fit(states: States, layers: Sequence[int], routers: Mapping[int, Router]) -> Maps:
    """The maps of `layers`, which are the columns of `states`, with the tokens before as features."""
    maps: dict[tuple[Point, int], LinearMap] = {}
    for column, layer in enumerate(layers):
        router = routers[layer]
        targets = router.logits(states.inputs[:, column].astype(np.float32))  # [T, E]
        for point in Point:
            rows = states.at(point, column)
            if rows is not None:
                weight, offset = _ridge(rows, states.starts, targets)
                maps[point, layer] = LinearMap(weight, offset, router.correction)
    return maps


def features(rows: Floats, starts: NDArray[np.bool_]) -> Floats:
    """Of consecutive tokens' states `rows` [T, H]: the states and their histories, [T, (1 + PARTS) H]."""
    before = histories(rows, starts)
    return np.concatenate((rows[:, None], before), axis=1).reshape(len(rows), -1)


def _ridge(rows: Floats, starts: NDArray[np.bool_], targets: Floats) -> tuple[Floats, Floats]:
    """Weight [F, E] and offset [E] with the least squared error, deviations from the means being penalised."""
    every = features(rows, starts)
    mean, center = every.mean(axis=0, dtype=np.float64), targets.mean(axis=0, dtype=np.float64)
    squares = np.zeros((every.shape[1], every.shape[1]))
    products = np.zeros((every.shape[1], targets.shape[1]))
    for start in range(0, len(every), _CHUNK):
        part = every[start : start + _CHUNK] - mean
        squares += part.T @ part
        products += part.T @ (targets[start : start + _CHUNK] - center)
    squares[np.diag_indices_from(squares)] += RIDGE * len(every)
    weight = np.linalg.solve(squares, products)
    return weight.astype(np.float32), (center - mean @ weight).astype(np.float32)


def _safe(gain: Floats) -> Floats:
    """A gain to divide by: a channel that the norm silences stays silent instead of exploding."""
    least = 1e-3 * float(np.abs(gain).mean())
    return np.where(np.abs(gain) < least, np.inf, gain).astype(np.float32)
