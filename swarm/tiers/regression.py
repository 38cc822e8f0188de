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
    """`weights` [F], which move from `prior` [F] to what fits the samples best. Deterministic.

    `without` [P, F] asks for further fits to the same samples, each without the features that its row marks: `fits`
    [1 + P, F] has all of them, with weights of 0 there.
    """

    def __init__(self, prior: Floats, without: NDArray[np.bool_] | None = None) -> None:
        left_out = np.zeros((0, len(prior)), np.bool_) if without is None else without
        self._known = np.vstack((np.ones((1, len(prior)), np.bool_), ~left_out))  # [1 + P, F]
        self.fits: Floats = self._known * prior
        self._prior = prior
        self._squares: Floats = np.zeros((len(prior), len(prior)))  # [F, F]
        self._products: Floats = np.zeros(len(prior))  # [F]
        self._samples = self._calls = 0.0

    @property
    def weights(self) -> Floats:
        """Of the fit with all features."""
        found: Floats = self.fits[0]
        return found

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
        for fit, known in zip(self.fits, self._known, strict=True):
            some = np.ix_(known, known)
            targets = self._products[known] + pull[some] @ self._prior[known]
            fit[known] = np.linalg.solve(self._squares[some] + pull[some], targets)
        self._squares *= _FORGET
        self._products *= _FORGET
        self._samples *= _FORGET
