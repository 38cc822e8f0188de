"""What a policy reaches whose predictor was fitted to the trace itself: a mark for policies that learn as they go.

Belady's policy knows what comes; nothing that sees only the past can. How much the past says about what comes is a
property of the trace. Here it is measured: linear regressions of every layer's experts on their own decayed averages
and on all that the layers used in the last token's time, fitted to all of the trace but the half that is at hand
(alternating blocks), which includes later tokens. The tiers' policy then evicts by these chances instead of its own.

Another kind of predictor may do better, so there is a second mark: the same policy, which besides knows exactly what
the next layers will use. A gate that is applied one layer early tells that for one layer, and not as well. What that
policy does not reach, no better guess of the next layer gives.

N tokens, L layers, E experts of each, F averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.lfru import HALF_LIVES, Lfru

from .routing import RoutingTrace

Floats = NDArray[np.floating[Any]]

RIDGE: Final = 100.0  # tokens
MAX_EXPERTS: Final = 1024  # of all layers, up to which the regression on other layers is small enough
_BLOCKS: Final = 6  # every other one is a half
_UNUSED: Final = 1e-6  # the chance of what is known not to be used


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """Chances of experts after each layer's call of each token, by regressions that did not see that token's block."""

    usual: Floats  # [N, L, E] float32: by an expert's own averages, at the layer's next call
    halves: NDArray[np.intp]  # [N]: which half a token belongs to
    active: NDArray[np.intp]  # [N, L, K]: what it used, as columns of `beyond`
    beyond: Floats  # [2, L, 1 + L E, L E] float32: what each last use, and a constant, add; no halves where left out

    def chances(self, token: int, column: int) -> tuple[Floats, Floats]:
        """At the next call [L, E], and where only its own averages are known, after `token` in layer `column`."""
        layers = self.usual.shape[1]
        usual = self.usual[token].copy()
        if token:
            usual[column + 1 :] = self.usual[token - 1, column + 1 :]  # their next call is this token's
        if not len(self.beyond):
            return usual, usual.copy()
        before = self.active[max(token - 1, 0), column + 1 :] if token else self.active[:0]
        rows = np.concatenate(([0], self.active[token, : column + 1].ravel(), before.ravel()))
        added = self.beyond[self.halves[token], column, rows].sum(axis=0).reshape(layers, -1)
        return np.clip(usual + added, 1e-3, 0.99), usual


class Hindsight(Lfru[ExpertKey]):
    """The tiers' policy, told what it otherwise estimates. Replays `trace` and nothing else.

    `ahead` is how many layers after the one that is computed it knows exactly, where a call has one token.
    """

    def __init__(self, trace: RoutingTrace, fitted: Fitted, *, ahead: int = 0) -> None:
        super().__init__(lambda key: (key.layer, key.expert), top_k=trace.top_k)
        self._trace = trace
        self._fitted = fitted
        self._ahead = ahead
        self._columns = {layer: column for column, layer in enumerate(trace.layers)}
        self._ends = np.cumsum(trace.tokens) - 1  # [C]
        self._calls = 0

    def _count(self, step: bytes) -> None:
        super()._count(step)
        self._calls += 1

    def _chances(self) -> tuple[Floats, Floats]:
        call, column = divmod(self._calls - 1, len(self._columns))
        chance, usual = self._fitted.chances(int(self._ends[call]), column)
        for step in range(self._calls, self._calls + self._ahead):
            later, at = divmod(step, len(self._columns))
            if later < len(self._ends) and self._trace.tokens[later] == 1:
                chance[at] = _UNUSED
                chance[at, self._trace.experts[self._ends[later], at]] = 1.0
        rows, experts = [self._columns[layer] for layer in self._rows], self._resident.shape[1]
        return chance[rows, :experts], usual[rows, :experts]

    def _floor(self) -> int:
        return 0


def fit_halves(trace: RoutingTrace, *, others: bool) -> Fitted:
    """Fit to each half what the other half is told. `others`: with what other layers used, where that is feasible."""
    count, layers, _ = trace.experts.shape
    cells = layers * trace.num_experts
    halves = np.arange(count) // (count // _BLOCKS + 1) % 2
    used = np.zeros((count, layers, trace.num_experts), np.float32)
    np.put_along_axis(used, trace.experts.astype(np.intp), 1.0, axis=2)
    usual = _by_averages(used, halves)
    active = 1 + trace.experts.astype(np.intp) + np.arange(layers)[:, None] * trace.num_experts  # [N, L, K]
    if not others or cells > MAX_EXPERTS:
        return Fitted(usual, halves, active, np.zeros((0, layers, 1 + cells, cells), np.float32))
    beyond = np.empty((2, layers, 1 + cells, cells), np.float32)
    for column in range(layers):
        known, missed = _after(used, usual, column)
        for half in (0, 1):
            rows = halves[: len(known)] != half
            some = known[rows]
            squares = some.T @ some + RIDGE * np.eye(1 + cells, dtype=np.float32)
            beyond[half, column] = np.linalg.solve(squares, some.T @ missed[rows])
    return Fitted(usual, halves, active, beyond)


def _by_averages(used: Floats, halves: NDArray[np.intp]) -> Floats:
    """The chance of each expert in the next token [N, L, E] by its own decayed averages, with the same weights for all.

    Two passes over the tokens, because the averages of all of them would be much memory.
    """
    terms = len(HALF_LIVES)
    squares, products = np.zeros((2, terms, terms)), np.zeros((2, terms))
    for token, averages in enumerate(_averages(used)):  # [F, L E]
        if token + 1 < len(used):
            squares[halves[token]] += averages @ averages.T
            products[halves[token]] += averages @ used[token + 1].ravel()
    weights = np.linalg.solve(squares[::-1] + np.eye(terms), products[::-1, :, None])[:, :, 0]  # [2, F]: of the others
    told = [weights[halves[token]] @ averages for token, averages in enumerate(_averages(used))]
    return np.clip(np.array(told, np.float32).reshape(used.shape), 1e-3, 0.99)


def _averages(used: Floats) -> Iterator[Floats]:
    """After each token, [F, L E]."""
    decay = 0.5 ** (1 / HALF_LIVES)[:, None]  # [F, 1]
    sums, seen = np.zeros((len(HALF_LIVES), used[0].size)), np.zeros_like(decay)
    for row in used:
        sums, seen = sums * decay + (1 - decay) * row.ravel(), seen * decay + 1 - decay
        yield sums / seen


def _after(used: Floats, usual: Floats, column: int) -> tuple[Floats, Floats]:
    """After each token but the last, in layer `column`: a constant and what every layer used last [N - 1, 1 + L E],
    and by how much the averages miss what each uses next [N - 1, L E]."""
    now, later = slice(0, column + 1), slice(column + 1, None)
    count = len(used) - 1
    last = np.zeros_like(used[:count])
    last[:, now], last[1:, later] = used[:count, now], used[: count - 1, later]
    missed = np.zeros_like(last)
    missed[:, now] = used[1:, now] - usual[:count, now]
    missed[1:, later] = used[1:count, later] - usual[: count - 1, later]
    known = np.concatenate((np.ones((count, 1), np.float32), last.reshape(count, -1)), axis=1)
    return known, missed.reshape(count, -1)
