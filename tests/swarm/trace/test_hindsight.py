"""The mark that is fitted to a trace: it knows what the other half tells, and nothing of the token to come."""

from __future__ import annotations

import numpy as np
import pytest

from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.replay import replay
from moehive.swarm.trace import hindsight
from moehive.swarm.trace.hindsight import Hindsight, fit_halves
from moehive.swarm.trace.routing import RoutingTrace


def coupled(tokens: int = 900) -> RoutingTrace:
    """Layer 0 uses any of eight experts, layer 1 the next one."""
    first = np.random.default_rng(2).integers(0, 8, tokens)
    experts = np.stack((first, (first + 1) % 8), axis=1)[:, :, None].astype(np.uint16)
    starts = np.zeros(tokens, np.bool_)
    starts[0] = True
    return RoutingTrace("coupled", (3, 5), 8, np.ones(tokens, np.int32), starts, experts)


def test_chances_tell_what_the_layer_before_says_and_not_what_nobody_can_know() -> None:
    trace = coupled()
    fitted = fit_halves(trace, others=True)
    told = [fitted.chances(token, 0)[0] for token in range(100, 200)]
    right = [chances[1, trace.experts[token, 1, 0]] for token, chances in enumerate(told, 100)]
    assert min(right) > 0.3, "by chance it is 1/8"
    ahead = [chances[0, trace.experts[token + 1, 0, 0]] for token, chances in enumerate(told, 100)]
    assert np.mean(ahead) == pytest.approx(1 / 8, abs=0.03)


def test_without_others_only_an_experts_own_past_counts() -> None:
    chance, usual = fit_halves(coupled(), others=False).chances(100, 0)
    assert np.array_equal(chance, usual)
    assert chance.shape == (2, 8)
    assert chance.max() < 0.4


def test_large_models_are_fitted_without_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hindsight, "MAX_EXPERTS", 8)
    chance, usual = fit_halves(coupled(), others=True).chances(50, 1)
    assert np.array_equal(chance, usual)


def test_who_is_told_the_next_layer_never_evicts_what_it_uses() -> None:
    trace = coupled(300)
    steps, fitted = list(trace.steps()), fit_halves(trace, others=False)
    blind, told = (replay(Hindsight(trace, fitted, ahead=ahead), steps, lambda _: 1, 4) for ahead in (0, 1))
    assert told.hits > 1.1 * blind.hits
    policy = Hindsight(trace, fitted, ahead=1)
    policy.step(steps[0])
    following = next(iter(steps[1].rows))
    for expert in (following.expert, (following.expert + 1) % 8):
        policy.loaded(ExpertKey(following.layer, expert), 1)
    assert policy.victims(None, 1, lambda _: False) == [ExpertKey(following.layer, (following.expert + 1) % 8)]
