"""What tends to follow what: the experts that other layers used since a layer's last call say which it uses next.

In trained models a token's experts of different layers depend on each other, and those of one token on those of the
last. So for every pair of layers it is counted how often an expert of the one was used in the token's time after an
expert of the other. How much that says is a property of the model, and less the more calls lie between: evidence is
added up by that distance in octaves, and regressions that are fitted as it goes weigh the sums, one for each octave
from which on calls are known. Where layers are independent the weights go to nothing.

R layers, E experts of each, G octaves.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .regression import OnlineRidge

Floats = NDArray[np.floating[Any]]

MAX_CELLS: Final = 4 << 20  # of the table, 4 bytes each; of larger models nothing is counted
_WEIGHT: Final = 0.5  # of an octave's evidence, before anything is known of the model
_DOUBT: Final = 16.0  # uses of an expert before half of what followed it is believed


def fits(rows: int, experts: int) -> bool:
    """Whether so many layers and experts can be counted."""
    return rows > 1 and (rows * experts) ** 2 <= MAX_CELLS


class Transitions:
    """Of a model whose layers are computed one after the other, in the order of their numbers here.

    Not told of calls in another order: `forget` then. O(K R E) per call of one token that uses K experts.
    """

    def __init__(self, rows: int, experts: int, weights: Floats) -> None:
        self._rows, self._experts = rows, experts
        octaves, features = rows.bit_length(), len(weights)
        away = (np.arange(rows)[None, :] - np.arange(rows)[:, None] - 1) % rows + 1  # [R, R]: calls from one to another
        self._octave = np.searchsorted(1 << np.arange(octaves), away, side="right") - 1  # [R, R]
        self._followed: Floats = np.zeros((rows * experts, rows * experts), np.float32)  # [R E, R E]
        self._times: Floats = np.zeros((rows * experts, rows), np.float32)  # [R E, R]: calls that could have followed
        self._evidence: Floats = np.zeros((rows, octaves, experts))  # [R, G, E] of each layer's next call
        self._recent: deque[NDArray[np.int64]] = deque(maxlen=rows)  # of the last token's time: [K] in R E, by call
        # The calls of the nearest octaves are not known yet when an expert of a layer that far away is judged.
        unknown = np.arange(features + octaves) - features < np.arange(1, octaves)[:, None]  # [G - 1, F + G]
        unknown[:, :features] = False
        self._fit = OnlineRidge(np.append(weights, np.full(octaves, _WEIGHT)), unknown)

    @property
    def ready(self) -> bool:
        """Whether a whole token's time is known."""
        return len(self._recent) == self._rows

    def forget(self) -> None:
        """What comes next does not follow what came before."""
        self._recent.clear()
        self._evidence[:] = 0

    def learn(self, row: int, columns: list[int], averages: Floats) -> None:
        """The layer `row` uses `columns`; its `averages` [F, E] before that are what else there is to expect it by."""
        if self.ready:
            self._fit.learn(np.concatenate((averages, self._evidence[row])), columns)
        if self._recent:
            sources = np.concatenate(self._recent)
            self._followed[sources[:, None], row * self._experts + np.array(columns)] += 1
            self._times[sources, row] += 1

    def follow(self, row: int, columns: list[int], usual: Floats) -> None:
        """Let that call say what is to come; `usual` [R, E] is how often experts are used whatever came before."""
        cells = row * self._experts + np.array(columns)
        times = self._times[cells][:, :, None]  # [K, R, 1]
        followed = self._followed[cells].reshape(len(cells), self._rows, self._experts)
        beyond = ((followed - times * usual) / (times + _DOUBT)).sum(axis=0) / len(cells)  # [R, E]
        self._evidence[row] = 0  # what is older than a token's time
        self._evidence[np.arange(self._rows), self._octave[row]] += beyond
        self._recent.append(cells)

    def chances(self, last: int, used: Floats, seen: Floats) -> Floats:
        """How likely each expert is used at its layer's next call [R, E], not clipped, after a call of `last`.

        `used` [R, F, E] over `seen` [R, F] are the averages.
        """
        weights = self._fit.fits[self._octave[last]]  # [R, F + G]
        features = seen.shape[1]
        found: Floats = np.matmul((weights[:, :features] / seen)[:, None], used)[:, 0]
        found += np.matmul(weights[:, None, features:], self._evidence)[:, 0]
        return found
