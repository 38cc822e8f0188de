import numpy as np
import pytest

from moehive.swarm.prefetch.attending import (
    HEADS,
    MIXED,
    SIZE,
    WIDTH,
    Asker,
    Reader,
    ask,
    empty_memory,
    remember,
)  # fmt: skip
from moehive.swarm.prefetch.history import empty_history
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor, margins, ranking, recall, unit

ROW = np.array([1.0, 2.0], np.float32)


def linear(rows: int) -> LinearMap:
    return LinearMap(np.ones((rows, 3), np.float32), np.array([0.0, 1.0, 2.0], np.float32))


def test_a_map_without_history_takes_the_state_alone() -> None:
    predictor = Predictor({(Point.ENTRY, 4): linear(2)}, 1, 2)
    features = predictor.features(Point.ENTRY, 4, ROW, empty_history(2), empty_memory())
    assert features is not None
    assert linear(2).scores(features).tolist() == [3.0, 4.0, 5.0]
    assert not predictor.uses_history


def test_a_map_with_history_takes_what_was_before() -> None:
    predictor = Predictor({(Point.BEFORE, 4): linear(8)}, 1, 2)
    features = predictor.features(Point.BEFORE, 4, ROW, empty_history(2) + 1, empty_memory())
    assert features is not None
    assert linear(8).scores(features).tolist() == [9.0, 10.0, 11.0]
    assert predictor.uses_history


def test_a_map_with_an_asker_takes_what_it_read_of_the_layers_memory() -> None:
    random = np.random.default_rng(0)
    shapes = ((2, WIDTH), (WIDTH,), (WIDTH + 2, MIXED), (MIXED,))
    asker = Asker(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
    reader = Reader(*(random.standard_normal(shape).astype(np.float32) for shape in ((2, 2 * WIDTH), (HEADS, SIZE))))
    found = LinearMap(np.zeros((2 + MIXED, 3), np.float32), np.zeros(3, np.float32), asker=asker)
    predictor = Predictor({(Point.BEFORE, 4): found}, 1, 2, {4: reader})
    memory = remember(reader, empty_memory(), ROW[None])
    nothing, something = (
        predictor.features(Point.BEFORE, 4, ROW, empty_history(2), held) for held in (empty_memory(), memory)
    )
    assert nothing is not None
    assert something is not None
    assert nothing.shape == something.shape == (2 + MIXED,)
    assert (something == ask(reader, asker, memory, ROW[None], 1)[0]).all()
    assert (something != nothing).any()
    assert not predictor.uses_history


def test_nothing_is_guessed_of_a_layer_that_is_not_known() -> None:
    predictor = Predictor({(Point.ENTRY, 4): linear(2)}, 1, 2)
    assert predictor.features(Point.BEFORE, 4, ROW, empty_history(2), empty_memory()) is None


def test_a_correction_counts_beside_the_sigmoid() -> None:
    found = LinearMap(np.zeros((2, 2), np.float32), np.zeros(2, np.float32), np.array([0.0, 0.25], np.float32))
    assert found.scores(ROW).tolist() == [0.5, 0.75]


def test_exactly_the_best_have_a_margin_above_zero() -> None:
    scores = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    beyond = margins(scores, 4)
    assert ((beyond > 0).sum(axis=1) == 4).all()
    assert (np.sort(ranking(scores, 4)) == np.sort(ranking(beyond, 4))).all()


def test_a_margin_does_not_depend_on_the_scale() -> None:
    scores = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    assert margins(7 * scores + 3, 4) == pytest.approx(margins(scores, 4), abs=1e-4)


def test_where_all_experts_are_used_all_are_certain() -> None:
    assert (margins(np.zeros(4, np.float32), 4) > 0).all()


def test_equals_are_ranked_by_number() -> None:
    assert ranking(np.array([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [1, 3, 0]


def test_recall_is_the_share_of_what_was_used() -> None:
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    used = np.array([[0, 2], [3, 2]])
    assert recall(scores, used, 2) == 0.75
    assert recall(scores, used, 3) == 1.0


def test_units_have_a_mean_square_of_one() -> None:
    rows = 5 * np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    assert np.square(unit(rows)).mean(axis=1) == pytest.approx([1.0] * 3)
