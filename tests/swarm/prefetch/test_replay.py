"""The prefetcher on a simulated link, with made-up tokens whose routing can be guessed about as well as real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moehive.protocol.ids import ExpertKey
from moehive.swarm.prefetch.control import Limits, Mode
from moehive.swarm.prefetch.fitting import States
from moehive.swarm.prefetch.plan import make_plan
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor, ranking, unit
from moehive.swarm.prefetch.prefetcher import Fate, Prefetcher
from moehive.swarm.prefetch.replay import Machine, Outcome, SimulatedTier, replay
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Uses

LAYERS, EXPERTS, TOP_K, HIDDEN = (0, 1, 2), 12, 2, 12
LIMITS = Limits(rest=48, longest_rest=96)


def tokens(count: int, *, noise: float, seed: int = 0) -> tuple[States, np.ndarray, Predictor]:
    """States of which the next layers' routers see `noise` more, and a predictor that knows those routers."""
    random = np.random.default_rng(seed)
    routers = random.standard_normal((len(LAYERS), HIDDEN, EXPERTS)).astype(np.float32)
    now = random.standard_normal((count, HIDDEN))
    residuals, inputs, chosen = [], [], []
    for layer in LAYERS:
        residuals.append(unit(now))
        now = unit(now) + noise * random.standard_normal(now.shape)
        inputs.append(unit(now))
        chosen.append(ranking(inputs[-1] @ routers[layer], TOP_K))
    starts = np.zeros(count, np.bool_)
    starts[0] = True
    zero = np.zeros(EXPERTS, np.float32)
    maps = {
        (point, layer): LinearMap(routers[layer], zero) for layer in LAYERS for point in Point if layer >= point.ahead
    }
    states = States(np.stack(inputs, axis=1), np.stack(residuals, axis=1), starts)
    return states, np.stack(chosen, axis=1), Predictor(maps, TOP_K, HIDDEN)


def run(count: int, load: Callable[[int], float], *, noise: float = 0.1, guess: bool = True) -> Outcome:
    """Layers of a second, half of it attention; a third of the experts fits."""
    states, chosen, predictor = tokens(count, noise=noise)
    policy: Lfru[ExpertKey] = Lfru(lambda key: (key.layer, key.expert), top_k=TOP_K)
    machine = Machine(attention=0.5, experts=0.5, load=load, slots=len(LAYERS) * EXPERTS // 3)
    return replay(states, chosen, LAYERS, predictor if guess else None, policy, machine, LIMITS)


def test_a_link_that_can_keep_up_hides_most_of_the_waiting() -> None:
    plain, guessed = run(300, lambda _: 0.3, guess=False), run(300, lambda _: 0.3)
    assert guessed.stalled < 0.6 * plain.stalled
    assert guessed.seconds < 0.9 * plain.seconds
    assert guessed.usefulness.wasted <= 0.25
    assert guessed.usefulness.hidden_seconds > 0
    assert guessed.usefulness.switched_off == 0


def test_a_link_too_slow_to_profit_switches_it_off() -> None:
    slow = run(600, lambda _: 30.0, noise=0.4)
    plain = run(600, lambda _: 30.0, noise=0.4, guess=False)
    modes = [mode for _, mode in slow.switched]
    assert modes[:3] == ["plain", "trial", "rest"]
    assert modes.count("trial") >= 2  # it tries again
    assert slow.usefulness.switched_off >= 2
    assert slow.seconds < 1.02 * plain.seconds


def test_guesses_that_are_mostly_wrong_load_next_to_nothing() -> None:
    wrong = run(400, lambda _: 0.3, noise=5.0)
    assert wrong.usefulness.points[Point.BEFORE].recall_at_k < 0.35
    assert wrong.usefulness.loads < 0.05 * wrong.loads
    assert wrong.usefulness.switched_off >= 1


def test_it_comes_back_when_the_link_is_quick_again() -> None:
    outcome = run(600, lambda token: 30.0 if token < 200 else 0.3, noise=0.1)
    modes = [mode for token, mode in outcome.switched if token >= 200]
    assert "on" in modes
    assert outcome.usefulness.hidden_seconds > 0


def test_the_budget_holds_and_what_is_needed_is_never_refused() -> None:
    tier_sizes: list[int] = []

    class Watched(Lfru[ExpertKey]):
        def loaded(self, key: ExpertKey, size: int) -> None:
            super().loaded(key, size)
            tier_sizes.append(int(self._counts.sum()))

    states, chosen, predictor = tokens(200, noise=0.3)
    policy = Watched(lambda key: (key.layer, key.expert), top_k=TOP_K)
    slots = TOP_K * 2 + 1  # of the floor
    replay(states, chosen, LAYERS, predictor, policy, Machine(0.5, 0.5, lambda _: 0.2, slots), LIMITS)
    assert max(tier_sizes) <= slots


def test_calls_of_many_tokens_are_not_guessed_and_end_what_was() -> None:
    states, _, predictor = tokens(8, noise=0.1)
    policy: Lfru[ExpertKey] = Lfru(lambda key: (key.layer, key.expert), top_k=TOP_K)
    tier = SimulatedTier(policy, 12, 0.3)
    prefetcher = Prefetcher(predictor, tier, LAYERS, clock=lambda: tier.now)
    rows = states.residuals[:, 0].astype(np.float32)
    for layer in LAYERS:
        prefetcher.entering(layer, rows)
        prefetcher.computing(layer, rows, range(EXPERTS))
    assert all(counts.guesses == 0 for counts in prefetcher.usefulness.points.values())


class Broken:
    """A shelf on which nothing works."""

    load_seconds = 0.1
    stalled_seconds = 0.0

    def absent(self, layer: int, experts: Sequence[int]) -> Sequence[bool]:
        raise OSError("no such shelf")

    def prefetch(self, layer: int, ranked: Sequence[tuple[int, float]], most: int) -> int:
        raise OSError("no such shelf")

    def outcomes(self) -> Sequence[Fate]:
        return ()


def test_a_guess_that_fails_is_no_error_and_the_last_one() -> None:
    states, chosen, predictor = tokens(20, noise=0.1)
    prefetcher = Prefetcher(predictor, Broken(), LAYERS)
    for token in range(20):
        for layer in LAYERS:
            prefetcher.entering(layer, states.residuals[token : token + 1, layer].astype(np.float32))
            prefetcher.computing(
                layer, states.inputs[token : token + 1, layer].astype(np.float32), chosen[token, layer].tolist()
            )
    assert prefetcher.usefulness.failed_guesses == 1
    assert prefetcher.idle


def test_resting_for_long_needs_no_attention() -> None:
    _, _, predictor = tokens(2, noise=0.1)
    tier = SimulatedTier(Lfru(lambda key: (key.layer, key.expert), top_k=TOP_K), 12, 0.3)
    prefetcher = Prefetcher(predictor, tier, LAYERS, clock=lambda: tier.now)
    assert not prefetcher.idle
    assert prefetcher.state.mode is Mode.PLAIN
    assert prefetcher.plan == make_plan({}, {}, prefetcher.bounds)


def test_a_load_that_is_under_way_is_waited_for_and_counted_as_hidden_in_part() -> None:
    tier = SimulatedTier(Lfru(lambda key: (key.layer, key.expert), top_k=TOP_K), 12, 1.0)
    assert tier.prefetch(0, [(3, 0.9)], most=1) == 1
    assert list(tier.absent(0, [3, 4])) == [False, True]
    tier.advance(0.25)
    uses = Uses(0, {ExpertKey(0, 3): 1})
    held, ready = tier.use(uses)
    assert ready == pytest.approx(1.0)
    tier.advance(ready)
    tier.end(held)
    (fate,) = tier.outcomes()
    assert fate.used
    assert fate.hidden == pytest.approx(0.25)
