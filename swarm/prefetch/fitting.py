"""What predictors are made of: the routers of a model, and the hidden states that its traces keep.

The predictor that needs no training is here, too; training.py fits the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moehive.protocol.errors import TraceError
from moehive.swarm.trace.routing import RoutingTrace

from .attending import ask_of_all
from .history import Floats, histories
from .predictors import LinearMap, Maps, Point, Predictor


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


Routers = Mapping[int, Router]  # by layer


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


def untrained(routers: Routers) -> Maps:
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


def by_routers(routers: Routers, top_k: int) -> Predictor:
    """The predictor that needs no training."""
    return Predictor(untrained(routers), top_k, next(iter(routers.values())).weight.shape[1])


def features_of(predictor: Predictor, point: Point, layer: int, column: int, states: States) -> Floats | None:
    """What the map of `layer`, in `column`, multiplies of every token, [T, F]; None where nothing can be guessed."""
    found, rows = predictor.maps.get((point, layer)), states.at(point, column)
    if found is None or rows is None:
        return None
    if found.asker is not None:
        entered = rows if point is Point.ENTRY else states.residuals[:, column].astype(np.float32)
        return ask_of_all(predictor.readers[layer], found.asker, entered, rows, states.starts)
    if predictor.has_history(found):
        return np.concatenate((rows[:, None], histories(rows, states.starts)), axis=1).reshape(len(rows), -1)
    return rows


def _safe(gain: Floats) -> Floats:
    """A gain to divide by: a channel that the norm silences stays silent instead of exploding."""
    least = 1e-3 * float(np.abs(gain).mean())
    return np.where(np.abs(gain) < least, np.inf, gain).astype(np.float32)
