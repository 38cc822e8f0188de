"""Fitting, on made-up states whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from moehive.swarm.prefetch import training
from moehive.swarm.prefetch.fitting import Router, States, by_routers, features_of
from moehive.swarm.prefetch.predictors import Point, Predictor, ranking, recall
from moehive.swarm.prefetch.training import fit

from .test_fitting import LAYERS, TOP_K, stream


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recalls(states: States, routers: dict[int, Router], predictor: Predictor, layer: int, point: Point) -> float:
    column = LAYERS.index(layer)
    known = features_of(predictor, point, layer, column, states)
    assert known is not None
    used = ranking(routers[layer].logits(states.inputs[:, column]), TOP_K)
    return recall(predictor.maps[point, layer].scores(known), used, TOP_K)


def test_a_fit_knows_what_the_tokens_before_add() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.1, tokens=4000)
    held_out, _ = stream(np.random.default_rng(0), change=0.1, tokens=1000, seed=1)
    fitted, plain = fit(states, LAYERS, routers, TOP_K), by_routers(routers, TOP_K)
    for layer in LAYERS:
        missed = 1 - recalls(held_out, routers, fitted, layer, Point.ENTRY)
        assert missed < 0.1
        assert missed < 0.5 * (1 - recalls(held_out, routers, plain, layer, Point.ENTRY))
    near, far, farther = (recalls(held_out, routers, fitted, 6, point) for point in Point)
    assert near > far > farther


def test_first_layers_have_no_guess_from_before() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.3, tokens=50)
    predictor = fit(states, LAYERS, routers, TOP_K)
    assert set(predictor.readers) == set(LAYERS)
    assert set(predictor.maps) == {
        *((Point.ENTRY, layer) for layer in LAYERS), (Point.BEFORE, 5), (Point.BEFORE, 6), (Point.EARLIER, 6),
    }  # fmt: skip


def test_a_fit_is_the_same_every_time_and_another_with_another_seed() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.3, tokens=300)
    one, two, other = (
        fit(states, LAYERS, routers, TOP_K, seed=seed).maps[Point.BEFORE, 5].weight.tobytes() for seed in (0, 0, 1)
    )
    assert one == two != other


def test_what_is_used_is_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network that learns, and what the arrays taken from it come to, in sessions that fill no window."""
    states, routers = stream(np.random.default_rng(0), change=0.3, tokens=700)
    states.starts[[100, 500]] = True
    learned = []
    learn = training._learn

    def watched(network: training._Network, rows: object, targets: object, windows: np.ndarray, *more: object) -> None:
        learn(network, rows, targets, windows, *more)  # type: ignore[arg-type]
        with torch.inference_mode():
            learned.append((windows, network([torch.from_numpy(found[windows]) for found in rows])))  # type: ignore

    monkeypatch.setattr(training, "_learn", watched)
    predictor = fit(states, LAYERS, routers, TOP_K)
    for column, (windows, by_point) in enumerate(learned):
        first = windows[(windows >= 0).all(axis=1) | (windows[:, 0] == 0)][0]  # begins a session
        first = first[first >= 0]
        for point, scores in zip(Point, by_point, strict=False):
            known = features_of(predictor, point, LAYERS[column], column, states)
            assert known is not None
            found = predictor.maps[point, LAYERS[column]].scores(known)[first]
            assert found == pytest.approx(scores[0, : len(first)].numpy(), abs=1e-3)


def test_a_router_with_a_correction_is_fitted_in_its_logits_themselves() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.1, tokens=2000)
    corrected = {
        layer: replace(router, correction=np.linspace(0, 0.5, len(router.weight), dtype=np.float32))
        for layer, router in routers.items()
    }
    predictor = fit(states, LAYERS, corrected, TOP_K)
    known = features_of(predictor, Point.ENTRY, 5, 1, states)
    assert known is not None
    found = predictor.maps[Point.ENTRY, 5]
    assert found.correction is corrected[5].correction
    logits = known @ found.weight + found.offset
    error = logits - routers[5].logits(states.inputs[:, 1])
    assert np.square(error.mean(axis=1)).mean() < 0.1 * np.square(error.mean(axis=1) - logits.mean(axis=1)).mean()
