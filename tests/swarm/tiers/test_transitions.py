"""What other layers used says what comes next: where it does, and no more than that."""

from __future__ import annotations

import numpy as np

from moehive.swarm.tiers.regression import OnlineRidge
from moehive.swarm.tiers.transitions import MAX_CELLS, Transitions, fits

ROWS, EXPERTS = 3, 4
EVEN = np.full((ROWS, EXPERTS), 1 / EXPERTS)  # averages that know nothing


def follow(transitions: Transitions, row: int, column: int) -> None:
    transitions.learn(row, [column], EVEN[row][None])
    transitions.follow(row, [column], EVEN)


def chances(transitions: Transitions, last: int) -> np.ndarray:
    return transitions.chances(last, EVEN[:, None], np.ones((ROWS, 1)))


def trained(*, coupled: bool) -> Transitions:
    """Layer 0 uses any expert, layer 1 the same one where they are coupled, layer 2 always any."""
    random = np.random.default_rng(3)
    transitions = Transitions(ROWS, EXPERTS, np.ones(1))
    for _ in range(1500):
        first, second, third = random.integers(0, EXPERTS, 3).tolist()
        for row, column in enumerate((first, first if coupled else second, third)):
            follow(transitions, row, column)
    return transitions


def test_what_follows_is_expected_and_what_is_independent_is_not() -> None:
    transitions = trained(coupled=True)
    follow(transitions, 0, 2)
    found = chances(transitions, 0)
    assert found[1, 2] > 0.7
    assert (found[1, [0, 1, 3]] < 0.15).all()
    assert np.abs(found[2] - 1 / EXPERTS).max() < 0.1
    assert np.abs(chances(trained(coupled=False), 2) - 1 / EXPERTS).max() < 0.1


def test_evidence_lasts_until_the_layers_call() -> None:
    transitions = trained(coupled=True)
    follow(transitions, 0, 2)
    follow(transitions, 1, 2)
    assert chances(transitions, 1)[1, 2] < 0.4, "the next token's is another matter"


def test_nothing_is_known_across_a_gap() -> None:
    transitions = trained(coupled=True)
    assert transitions.ready
    transitions.forget()
    assert not transitions.ready
    for row in range(ROWS):
        assert not transitions.ready
        follow(transitions, row, 1)
    assert transitions.ready


def test_large_models_are_left_out() -> None:
    assert fits(24, 60)
    assert not fits(48, 128)
    assert not fits(1, 8), "there is nothing else to learn from"
    assert MAX_CELLS < (48 * 128) ** 2


def test_fits_without_a_feature_are_those_of_a_regression_that_never_had_it() -> None:
    random = np.random.default_rng(0)
    prior = np.array([0.5, 0.2, 0.1])
    whole = OnlineRidge(prior, np.array([[False, True, False]]))
    part = OnlineRidge(prior[[0, 2]])
    for _ in range(200):
        features = random.random((3, 16))
        hits = np.flatnonzero(features[0] > 0.6).tolist()
        whole.learn(features, hits)
        part.learn(features[[0, 2]], hits)
    assert np.allclose(whole.fits[1], [part.weights[0], 0, part.weights[1]])
    assert not np.allclose(whole.weights, whole.fits[1])
