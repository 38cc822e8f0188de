"""What guesses are worth on recorded tokens, whatever is resident: recall by width, and the bytes it costs.

The bytes are those of loading everything that is wanted, as if nothing were resident: what a memory keeps makes both
the useful and the useless part smaller (replay.py has a memory).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapting import adapt, adaptable, stride
from .fitting import Routers, States, features_of
from .history import Floats
from .predictors import Point, Predictor, margins, recall

WIDTHS = (0, 1, 2)  # beyond k

Experts = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Recall:
    """Mean over the layers that can be guessed at a point; `layers` has each by itself. `at` is by WIDTHS."""

    point: Point
    at: tuple[float, ...]
    layers: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Width:
    """Guesses that want every expert above a margin: as many as are likely, which differs from token to token."""

    recall: float
    wasted: float  # share of the wanted experts that are not used
    width: float  # experts wanted per token


def split(states: States, experts: Experts, share: float) -> tuple[tuple[States, Experts], tuple[States, Experts]]:
    """The first `share` of the tokens, and the rest as a session of its own."""
    cut = round(share * len(experts))
    starts = states.starts[cut:].copy()
    starts[:1] = True
    first = States(states.inputs[:cut], states.residuals[:cut], states.starts[:cut])
    return (first, experts[:cut]), (States(states.inputs[cut:], states.residuals[cut:], starts), experts[cut:])


def all_scores(
    predictor: Predictor, states: States, layers: Sequence[int], point: Point, routers: Routers | None = None
) -> Iterator[tuple[int, int, Floats]]:
    """Column, layer and scores [T, E] of every layer that is guessed at this point.

    With `routers` the predictor learns as it guesses: each token's scores are those of what it knew until then.
    """
    predictor = predictor if routers is None else adaptable(predictor)
    for column, layer in enumerate(layers):
        known = features_of(predictor, point, layer, column, states)
        if known is None:
            continue
        found = predictor.maps[point, layer]
        if routers is None:
            yield column, layer, found.scores(known)
            continue
        inputs, scores = states.inputs[:, column].astype(np.float32), []
        for token in range(len(known)):
            scores.append(found.scores(known[token]))
            if token % stride(found) == 0:
                adapt(found, known[token], routers[layer], inputs[token])
        yield column, layer, np.array(scores)


def tokens_recall(
    predictor: Predictor, states: States, experts: Experts, layers: Sequence[int], routers: Routers | None = None
) -> list[Recall]:
    """At every point that the predictor knows, the closest first; `routers` as for `all_scores`."""
    found = []
    for point in Point:
        by_layer = [
            (layer, tuple(recall(scores, experts[:, column], predictor.top_k + extra) for extra in WIDTHS))
            for column, layer, scores in all_scores(predictor, states, layers, point, routers)
        ]
        if by_layer:
            means = np.mean([at for _, at in by_layer], axis=0)
            found.append(Recall(point, tuple(float(mean) for mean in means), tuple(by_layer)))
    return found


def width_for(
    predictor: Predictor, states: States, experts: Experts, layers: Sequence[int], point: Point, wanted: float,
    routers: Routers | None = None,
) -> Width:  # fmt: skip
    """The least that has to be loaded, over all layers, to reach the recall `wanted`; `routers` as for `all_scores`."""
    beyond, used = [], []
    for column, _, scores in all_scores(predictor, states, layers, point, routers):
        hit = np.zeros(scores.shape, dtype=np.bool_)
        np.put_along_axis(hit, experts[:, column].astype(np.intp), True, axis=1)
        beyond.append(margins(scores, predictor.top_k).ravel())
        used.append(hit.ravel())
    order = np.argsort(-np.concatenate(beyond), kind="stable")
    hits = np.cumsum(np.concatenate(used)[order])
    count = int(np.searchsorted(hits, wanted * hits[-1])) + 1
    tokens = len(beyond) * len(experts)
    return Width(float(hits[count - 1] / hits[-1]), float(1 - hits[count - 1] / count), count / tokens)
