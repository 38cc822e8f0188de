"""Linear regression that is fitted while it is used: ridge towards given weights, old samples slowly forgotten."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_PRIOR: Final = 4000.0  # samples that it takes to move the weights half of the way
_REFIT: Final = 64  # calls of `learn` between two fits
_FORGET: Final = 0.98  # of what was learned, kept at each fit
_JITTER: Final = 1e-6  # keeps the equations solvable where features are copies of each other


class OnlineRidge:
    """`weights` [F], which move from `prior` [F] to what fits the samples best. Deterministic."""

    def __init__(self, prior: Floats) -> None:
        self.weights: Floats = prior
        self._prior = prior
        self._squares: Floats = np.zeros((len(prior), len(prior)))  # [F, F]
        self._products: Floats = np.zeros(len(prior))  # [F]
        self._samples = self._calls = 0.0

    def learn(self, features: Floats, hits: list[int]) -> None:
        """Samples `features` [F, N], whose target is 1 for the columns `hits` and 0 for all others."""
        self._squares += features @ features.T
        self._products += features[:, hits].sum(axis=1)
        self._samples += features.shape[1]
        self._calls += 1
        if self._calls % _REFIT == 0:
            self._fit()

    def _fit(self) -> None:
        scale = _PRIOR / self._samples
        pull = scale * self._squares + _JITTER * self._samples * np.eye(len(self._prior))  # [F, F]
        self.weights = np.linalg.solve(self._squares + pull, self._products + pull @ self._prior)
        self._squares *= _FORGET
        self._products *= _FORGET
        self._samples *= _FORGET
