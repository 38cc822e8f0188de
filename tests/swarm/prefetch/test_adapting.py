"""Maps that learn as they guess: on made-up states whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from moehive.protocol.ids import ExpertKey
from moehive.swarm.prefetch import adapting
from moehive.swarm.prefetch.adapting import adapt, adaptable, stride
from moehive.swarm.prefetch.attending import Asker
from moehive.swarm.prefetch.fitting import Router, States, by_routers
from moehive.swarm.prefetch.history import PARTS
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor, ranking, unit
from moehive.swarm.prefetch.replay import Machine, replay
from moehive.swarm.prefetch.scoring import tokens_recall
from moehive.swarm.tiers.lfru import Lfru

HIDDEN, EXPERTS, TOP_K, TOKENS = 12, 16, 4, 1500
LAYERS = (3, 5)
ASKER = Asker(*(np.zeros(1, np.float32),) * 4)


def a_model(random: np.random.Generator) -> tuple[States, np.ndarray, dict[int, Router]]:
    """What enters a layer is turned by its attention, always in the same way; layer 5 sees the token before, too."""
    routers = {
        layer: Router(
            random.standard_normal((EXPERTS, HIDDEN)).astype(np.float32),
            np.zeros(EXPERTS, np.float32),
            np.ones(HIDDEN, np.float32),
        )
        for layer in LAYERS
    }
    turns = [random.standard_normal((HIDDEN, HIDDEN)) / 4 for _ in LAYERS]
    entry = unit(random.standard_normal((TOKENS, HIDDEN)))
    inputs = [unit(entry + entry @ turns[0]), unit(entry + np.roll(entry, 1, axis=0) @ turns[1])]
    starts = np.zeros(TOKENS, np.bool_)
    starts[0] = True
    states = States(np.stack(inputs, axis=1), np.stack((entry, entry), axis=1), starts)
    logits = [routers[layer].logits(row) for layer, row in zip(LAYERS, inputs, strict=True)]
    return states, np.stack([ranking(rows, TOP_K) for rows in logits], axis=1), routers


def test_guesses_get_better_without_a_trace() -> None:
    states, experts, routers = a_model(np.random.default_rng(0))
    plain = by_routers(routers, TOP_K)
    before, *_ = tokens_recall(plain, states, experts, LAYERS)
    after, *_ = tokens_recall(plain, states, experts, LAYERS, routers)
    assert before.point is after.point is Point.ENTRY
    for (_, as_it_was), (_, learned) in zip(before.layers, after.layers, strict=True):
        assert learned[0] > as_it_was[0] + 0.05, "layer 5 can only learn from the token before"
    again, *_ = tokens_recall(plain, states, experts, LAYERS)
    assert again == before, "what learns is a copy"


@pytest.mark.parametrize(("asker", "rate"), [(None, adapting.RATE), (ASKER, adapting.FITTED_RATE)])
def test_a_step_takes_its_share_off_the_error(asker: Asker | None, rate: float) -> None:
    random = np.random.default_rng(1)
    router = Router(random.random((EXPERTS, HIDDEN)).astype(np.float32), np.zeros(EXPERTS, np.float32), np.ones(HIDDEN))
    found = LinearMap(np.zeros((HIDDEN, EXPERTS), np.float32), np.zeros(EXPERTS, np.float32), None, asker)
    features, row = 9 * unit(random.standard_normal(HIDDEN)), unit(random.standard_normal(HIDDEN))
    adapt(found, features, router, row)
    left = (router.logits(row) - found.scores(features)) / router.logits(row)
    assert left == pytest.approx(np.full(EXPERTS, 1 - rate), abs=0.02)


def test_large_maps_learn_seldom_and_only_from_the_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = LinearMap(np.ones((HIDDEN, EXPERTS), np.float32), np.ones(EXPERTS, np.float32))
    predictor, key = Predictor({(Point.ENTRY, 0): found}, TOP_K, HIDDEN), (Point.ENTRY, 0)
    assert adaptable(predictor).maps[key].weight.shape == ((1 + PARTS) * HIDDEN, EXPERTS)
    assert stride(found) == 1
    monkeypatch.setattr(adapting, "_MOST", HIDDEN * EXPERTS)
    assert adaptable(predictor).maps[key].weight.shape == (HIDDEN, EXPERTS)
    monkeypatch.setattr(adapting, "_CHEAP", HIDDEN * EXPERTS // 3)
    assert stride(found) == 3
    states, experts, routers = a_model(np.random.default_rng(0))
    often = by_routers(routers, TOP_K)
    seldom, *_ = tokens_recall(often, states, experts, LAYERS, routers)
    monkeypatch.setattr(adapting, "_CHEAP", HIDDEN * EXPERTS)
    every, *_ = tokens_recall(often, states, experts, LAYERS, routers)
    assert seldom.at[0] < every.at[0]


def test_a_prefetcher_that_knows_the_routers_learns_as_it_guesses() -> None:
    states, experts, routers = a_model(np.random.default_rng(0))
    machine = Machine(attention=0.5, experts=0.5, load=lambda _: 0.2, slots=2 * TOP_K + 1)
    recalls = [
        replay(states, experts, LAYERS, by_routers(routers, TOP_K), lfru(), machine, routers=known).usefulness
        for known in (None, routers)
    ]
    plain, learned = (found.points[Point.ENTRY].recall_at_k for found in recalls)
    assert learned > plain + 0.05


def lfru() -> Lfru[ExpertKey]:
    return Lfru(lambda key: (key.layer, key.expert), top_k=TOP_K)
