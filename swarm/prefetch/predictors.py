"""Which experts a layer will use, guessed from a hidden state that exists before the layer's router sees its own.

There are three points to guess at, and a linear map for each point and layer. Untrained, the map is the layer's own
router: hidden states change little from layer to layer (Eliseev and Mazur, arXiv 2312.17238, section 3.2). Fitted, as
in arXiv 2511.10676, it also takes what a small network made of the state and of the tokens before (attending.py).

Everything here is a function of its arguments. E experts, H hidden size, F features.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .attending import Asker, Memory, Reader, ask
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

    weight: [F, E] float32, with F = H, (1 + PARTS) H where the tokens' history counts, or H + MIXED with an asker.
    offset: [E] float32. correction: [E] float32, for routers that choose by sigmoid(logit) + correction (DeepSeek-V3).
    """

    weight: Floats
    offset: Floats
    correction: Floats | None = None
    asker: Asker | None = None

    def scores(self, features: Floats) -> Floats:
        """[..., F] to [..., E]."""
        logits: Floats = features @ self.weight + self.offset
        return logits if self.correction is None else 1 / (1 + np.exp(-logits)) + self.correction


Maps = Mapping[tuple[Point, int], LinearMap]


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """The maps of one model, by point and by the layer whose experts are guessed; the readers by that layer."""

    maps: Maps
    top_k: int
    hidden_size: int
    readers: Mapping[int, Reader] = field(default_factory=dict)

    @property
    def uses_history(self) -> bool:
        """Whether any map takes what the tokens before had."""
        return any(self.has_history(found) for found in self.maps.values())

    def has_history(self, found: LinearMap) -> bool:
        """Whether this map does."""
        return found.asker is None and found.weight.shape[0] > self.hidden_size

    def features(self, point: Point, layer: int, row: Floats, history: Floats, memory: Memory) -> Floats | None:
        """What the map of `layer` multiplies, [F], for one token's state `row` [H]; None where there is no map.

        Before the layer the row is the input of an earlier layer's experts; at ENTRY what enters the decoder layer,
        divided by its root mean square. `history` [PARTS, H] is of the same point, `memory` of the guessed layer.
        """
        found = self.maps.get((point, layer))
        if found is None:
            return None
        if found.asker is not None:
            result: Floats = ask(self.readers[layer], found.asker, memory, row[None], memory.end)[0]
            return result
        return np.concatenate((row[None], history)).reshape(-1) if self.has_history(found) else row


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
