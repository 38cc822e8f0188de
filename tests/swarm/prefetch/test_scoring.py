import numpy as np
import pytest

from moehive.swarm.prefetch.fitting import States
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor, ranking
from moehive.swarm.prefetch.scoring import split, tokens_recall, width_for

TOKENS, EXPERTS, TOP_K, LAYERS = 200, 8, 2, (4, 5)


def recorded() -> tuple[States, np.ndarray, Predictor]:
    """Layer 4 can be told for sure from what enters it; layer 5 not at all."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((TOKENS, 2, EXPERTS)).astype(np.float32)
    starts = np.zeros(TOKENS, np.bool_)
    starts[[0, 150]] = True
    experts = np.stack((ranking(rows[:, 0], TOP_K), ranking(random.standard_normal((TOKENS, EXPERTS)), TOP_K)), axis=1)
    zero = np.zeros(EXPERTS, np.float32)
    maps = {(Point.ENTRY, layer): LinearMap(np.eye(EXPERTS, dtype=np.float32), zero) for layer in LAYERS}
    return States(rows, rows, starts), experts, Predictor(maps, TOP_K, EXPERTS)


def test_recall_is_told_by_layer_and_on_average() -> None:
    states, experts, predictor = recorded()
    (found,) = tokens_recall(predictor, states, experts, LAYERS)
    sure, chance = (at for _, at in found.layers)
    assert sure == (1.0, 1.0, 1.0)
    assert chance[0] == pytest.approx(TOP_K / EXPERTS, abs=0.06)
    assert found.at[0] == pytest.approx((sure[0] + chance[0]) / 2)
    assert chance[0] < chance[1] < chance[2]


def test_a_higher_recall_wants_more_and_wastes_more() -> None:
    states, experts, predictor = recorded()
    few = width_for(predictor, states, experts, LAYERS, Point.ENTRY, 0.5)
    many = width_for(predictor, states, experts, LAYERS, Point.ENTRY, 0.9)
    assert few.recall == pytest.approx(0.5, abs=0.01)
    assert many.recall == pytest.approx(0.9, abs=0.01)
    assert few.width < many.width
    assert few.wasted < many.wasted
    assert many.wasted == pytest.approx(1 - many.recall * TOP_K / many.width, abs=0.01)


def test_a_split_begins_a_session() -> None:
    states, experts, _ = recorded()
    (first, before), (rest, after) = split(states, experts, 0.6)
    assert (len(before), len(after)) == (120, 80)
    assert first.starts.sum() == 1
    assert np.flatnonzero(rest.starts).tolist() == [0, 30]
    assert not states.starts[120]
