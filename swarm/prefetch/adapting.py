"""Maps go on learning while they guess: what a layer's router then says of its own input is what they should have said.

One step of the normalised least mean squares (Widrow and Hoff, "Adaptive switching circuits", 1960; Nagumo and Noda,
IEEE Trans. Automatic Control 12(3), 1967) for each guess. It needs no recorded trace, and follows texts that change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from .fitting import Router
from .history import PARTS, Floats
from .predictors import LinearMap, Predictor

RATE: Final = 0.3  # share of an error that a step takes off
MAX_WEIGHTS: Final = 1 << 19  # of a map, beyond which a step would take longer than a guess is worth
_OFFSET: Final = 0.05  # how much slower the offset moves


Routers = Mapping[int, Router]  # by layer


def adaptable(predictor: Predictor) -> Predictor:
    """One with the same maps, which `adapt` may change; they can learn from the tokens before, where that is cheap."""
    return Predictor(
        {key: _with_history(found, predictor.hidden_size) for key, found in predictor.maps.items()},
        predictor.top_k,
        predictor.hidden_size,
    )


def _with_history(found: LinearMap, hidden: int) -> LinearMap:
    weight = found.weight.copy()
    if len(weight) == hidden and (1 + PARTS) * weight.size <= MAX_WEIGHTS:
        weight = np.pad(weight, ((0, PARTS * hidden), (0, 0)))
    return LinearMap(weight, found.offset.copy(), found.correction)


def adapt(found: LinearMap, features: Floats, router: Router, row: Floats) -> None:
    """Move a map towards what `router` says of the state `row` [H] that `features` [F] were a guess of; in place."""
    if found.weight.size > MAX_WEIGHTS:
        return
    error = router.logits(row) - (features @ found.weight + found.offset)  # [E]
    step = (RATE / (float(features @ features) + 1)) * features  # [F]
    found.weight[...] += np.multiply.outer(step, error)
    found.offset[...] += RATE * _OFFSET * error
