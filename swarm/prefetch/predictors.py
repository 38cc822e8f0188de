"""Which experts a layer will use, guessed from a hidden state that exists before the layer's router sees its own.

There are three points to guess at, and a linear map for each point and layer. Untrained, the map is the layer's own
router: hidden states change little from layer to layer (Eliseev and Mazur, arXiv 2312.17238, section 3.2). Fitted, it
also takes what the tokens before had at the same point, and was regressed on the router's logits; before attention this
is the predictor of arXiv 2511.10676.

Everything here is a function of its arguments. E experts, H hidden size, F features.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .history import Floats


class Point(enum.Enum):
    """Where a guess is made."""

    ENTRY = 0  # from what enters the decoder layer: surest, and there is only its attention to hide behind
    BEFORE = 1  # from what the experts of the layer before get: its experts and an attention to hide behind
    EARLIER = 2  # the same two layers before

    @property
    def ahead(self) -> int:
        """Layers."""
        return self.value


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """Scores of a layer's experts: features @ weight + offset, of which the router takes the greatest.

    weight: [F, E] float32, with F = H, or (1 + PARTS) H where the tokens before count. offset: [E] float32.
    correction: [E] float32, for routers that choose by sigmoid(logit) + correction (DeepSeek-V3).
    """

    weight: Floats
    offset: Floats
    correction: Floats | None = None

    def scores(self, features: Floats) -> Floats:
        """[..., F] to [..., E]."""
        logits: Floats = features @ self.weight + self.offset
        return logits if self.correction is None else 1 / (1 + np.exp(-logits)) + self.correction


Maps = Mapping[tuple[Point, int], LinearMap]


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """The maps of one model: by point and by the layer whose experts are guessed."""

    maps: Maps
    top_k: int
    hidden_size: int

    @property
    def uses_history(self) -> bool:
        """Whether any map takes what the tokens before had."""
        return any(found.weight.shape[0] > self.hidden_size for found in self.maps.values())

    def scores(self, point: Point, layer: int, row: Floats, history: Floats) -> Floats | None:
        """Of the experts of `layer` [E], for one token's state `row` [H]; None where nothing is known of it.

        Before the layer the row is the input of an earlier layer's experts; at ENTRY what enters the decoder layer,
        divided by its root mean square. `history` [PARTS, H] is of the same point.
        """
        features = self.features(point, layer, row, history)
        return None if features is None else self.maps[point, layer].scores(features)

    def features(self, point: Point, layer: int, row: Floats, history: Floats) -> Floats | None:
        """What the map multiplies, [F], for the arguments of `scores`; None where there is no map."""
        found = self.maps.get((point, layer))
        if found is None:
            return None
        return np.concatenate((row[None], history)).reshape(-1) if found.weight.shape[0] > len(row) else row


def unit(hidden: Floats) -> Floats:
    """`hidden` [..., H] divided by the root mean square of each row."""
    mean = np.mean(np.square(hidden, dtype=np.float32), axis=-1, keepdims=True)
    result: Floats = (hidden / np.sqrt(mean + 1e-12)).astype(np.float32)
    return result


def margins(scores: Floats, top_k: int) -> Floats:
    """How far each score [..., E] lies above the middle between the `top_k`-th and the next, in standard deviations.

    Above 0 for exactly the `top_k` best. What makes guesses of different tokens comparable.
    """
    if scores.shape[-1] <= top_k:
        return np.ones_like(scores)
    place = scores.shape[-1] - top_k
    ordered = np.partition(scores, (place - 1, place), axis=-1)
    middle = (ordered[..., place - 1] + ordered[..., place]) / 2
    spread = scores.std(axis=-1) + 1e-12
    result: Floats = (scores - middle[..., None]) / spread[..., None]
    return result


def ranking(scores: Floats, width: int) -> NDArray[np.intp]:
    """The `width` best of `scores` [..., E], best first: [..., width]. Of equals the lowest number is first."""
    order: NDArray[np.intp] = np.argsort(-scores, axis=-1, kind="stable")[..., :width]
    return order


def recall(scores: Floats, used: NDArray[Any], width: int) -> float:
    """Share of the `used` experts [T, K] that are among the `width` best by `scores` [T, E]."""
    guessed = ranking(scores, width)  # [T, width]
    return float((guessed[:, :, None] == used[:, None, :]).any(axis=1).mean())
