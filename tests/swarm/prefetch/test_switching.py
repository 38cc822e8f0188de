"""When the prefetcher loads and when it rests, by what it sees: token times, loads, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from moehive.swarm.prefetch.control import Limits, Mode
from moehive.swarm.prefetch.prefetcher import Prefetcher

from .test_replay import LAYERS, tokens

SIZE = 10  # bytes of a load
LIMITS = Limits(probe=24, window=8, rest=16)


class ScriptedShelf:
    """Nothing is resident; what is loaded on a guess is used or not as a test says."""

    load_seconds, stalled_seconds = 0.01, 0.0

    def __init__(self) -> None:
        self.begun = 0
        self.willing, self.used = True, True
        self._fates: list[Any] = []

    def absent(self, layer: int, experts: Sequence[int]) -> Sequence[bool]:
        return [True] * len(experts)

    def prefetch(self, layer: int, ranked: Sequence[tuple[int, float]], most: int) -> int:
        count = min(most, len(ranked)) if self.willing else 0
        self.begun += count
        self._fates += [SimpleNamespace(size=SIZE, used=self.used, hidden=0.0)] * count
        return count

    def outcomes(self) -> Sequence[Any]:
        fates, self._fates = self._fates, []
        return fates


class Generation:
    """Tokens whose experts its guesses name rightly, decoded as slowly as a test says."""

    def __init__(self) -> None:
        self.shelf, self.now = ScriptedShelf(), 0.0
        self._states, self._chosen, predictor = tokens(1, noise=0.0)
        self.prefetcher = Prefetcher(predictor, self.shelf, LAYERS, limits=LIMITS, clock=lambda: self.now)

    @property
    def mode(self) -> Mode:
        return self.prefetcher.state.mode

    def decode(self, seconds: float, *, until: Mode, most: int = 200) -> None:
        """Tokens of `seconds` each until the mode is another than now, which has to be `until`."""
        before = self.mode
        for _ in range(most):
            self._token(seconds)
            if self.mode is not before:
                break
        assert self.mode is until

    def _token(self, seconds: float) -> None:
        for column, layer in enumerate(LAYERS):
            self.prefetcher.entering(layer, self._states.residuals[:, column].astype(np.float32))
            self.now += seconds / len(LAYERS)
            self.prefetcher.computing(
                layer, self._states.inputs[:, column].astype(np.float32), self._chosen[0, column].tolist()
            )


def test_it_loads_on_trial_and_while_it_gains_only() -> None:
    run = Generation()
    run.decode(1.0, until=Mode.TRIAL)
    first = run.shelf.begun
    assert first <= 2 * len(LAYERS), "while plain tokens were measured, it loaded"
    run.decode(0.9, until=Mode.ON)
    assert run.shelf.begun > first
    run.decode(1.1, until=Mode.REST)
    before = run.shelf.begun
    run.decode(1.0, until=Mode.TRIAL)
    assert run.shelf.begun - before <= 2 * len(LAYERS), "while it rested, it loaded"
    run.decode(0.9, until=Mode.ON)


def test_bytes_that_leave_unused_end_it_though_tokens_are_no_slower() -> None:
    run = Generation()
    run.shelf.used = False
    run.decode(1.0, until=Mode.TRIAL)
    run.decode(0.5, until=Mode.REST)
    assert run.prefetcher.state.reason == "100% of the prefetched bytes were not used"
    assert (run.prefetcher.usefulness.switched_off, run.prefetcher.usefulness.wasted) == (1, 1.0)


def test_each_window_is_judged_by_its_own_tokens() -> None:
    """The trial is shorter than the probe before it, whose tokens must not speak for it."""
    run = Generation()
    run.decode(1.0, until=Mode.TRIAL)
    run.decode(2.0, until=Mode.REST)
    assert run.prefetcher.state.reason == "tokens take 2.00 times as long as without prefetch"


def test_each_window_is_judged_by_its_own_loads() -> None:
    run = Generation()
    run.decode(1.0, until=Mode.TRIAL)
    run.decode(0.9, until=Mode.ON)
    run.shelf.willing = False
    run.decode(0.9, until=Mode.REST)
    assert run.prefetcher.state.reason == "nothing was worth loading on a guess"
