"""Maps go on learning while they guess: what a layer's router then says of its own input is what they should have said.

One step of the normalised least mean squares (Widrow and Hoff, "Adaptive switching circuits", 1960; Nagumo and Noda,
IEEE Trans. Automatic Control 12(3), 1967) for each guess, or for every so many of large maps. It needs no recorded
trace, and follows texts that change.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from .fitting import Router
from .history import PARTS, Floats
from .predictors import LinearMap, Predictor

RATE: Final = 0.3  # share of an error that a step takes off
FITTED_RATE: Final = 0.1  # the same of maps that know much already: larger steps lose more of it than they gain
_CHEAP: Final = 1 << 14  # weights of a map, for which a step takes about ten microseconds
_MOST: Final = 1 << 16  # weights of a map, up to which it may have those of the tokens before
_OFFSET: Final = 0.05  # how much slower the offset moves


def adaptable(predictor: Predictor) -> Predictor:
    """One with the same maps, which `adapt` may change; they can learn from the tokens before, where that is cheap."""
    return Predictor(
        {key: _with_history(found, predictor.hidden_size) for key, found in predictor.maps.items()},
        predictor.top_k,
        predictor.hidden_size,
        predictor.readers,
    )


def _with_history(found: LinearMap, hidden: int) -> LinearMap:
    weight = found.weight.copy()
    if len(weight) == hidden and (1 + PARTS) * weight.size <= _MOST:
        weight = np.pad(weight, ((0, PARTS * hidden), (0, 0)))
    return LinearMap(weight, found.offset.copy(), found.correction, found.asker)


def stride(found: LinearMap) -> int:
    """Of how many guesses by a map one is learned from, so that learning costs the same whatever its size."""
    return -(-found.weight.size // _CHEAP)


def adapt(found: LinearMap, features: Floats, router: Router, row: Floats) -> None:
    """Move a map towards what `router` says of the state `row` [H] that `features` [F] were a guess of; in place."""
    rate = RATE if found.asker is None else FITTED_RATE
    error = router.logits(row) - (features @ found.weight + found.offset)  # [E]
    step = (rate / (float(features @ features) + 1)) * features  # [F]
    found.weight[...] += np.multiply.outer(step, error)
    found.offset[...] += rate * _OFFSET * error
