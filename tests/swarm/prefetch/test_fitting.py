"""The predictor that needs no training, on made-up states whose truth is known."""

import numpy as np
import pytest

from moehive.swarm.prefetch.fitting import Router, States, untrained
from moehive.swarm.prefetch.predictors import LinearMap, Maps, Point, ranking, recall, unit

TOKENS, HIDDEN, EXPERTS, TOP_K = 600, 12, 16, 4
LAYERS = (3, 5, 6)
Arrays = np.random.Generator


def router(random: Arrays) -> Router:
    weight = random.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
    gain = random.uniform(0.5, 2.0, HIDDEN).astype(np.float32)
    return Router(weight, random.standard_normal(EXPERTS).astype(np.float32) / 4, gain)


def stream(
    random: Arrays, change: float, tokens: int = TOKENS, seed: int | None = None
) -> tuple[States, dict[int, Router]]:
    """States that change a little from layer to layer; attention adds half of what the token before had.

    The model is drawn from `random`, and so are the tokens but with a `seed` of their own.
    """
    routers = {layer: router(random) for layer in LAYERS}
    random = random if seed is None else np.random.default_rng(seed)
    now = unit(random.standard_normal((tokens, HIDDEN)))
    residuals, inputs = [], []
    for layer in LAYERS:
        residuals.append(unit(now))
        now = now + 0.5 * np.roll(unit(now), 1, axis=0)
        inputs.append(unit(now) * routers[layer].gain)
        now = now + change * random.standard_normal(now.shape)
    starts = np.zeros(tokens, np.bool_)
    starts[0] = True
    return States(np.stack(inputs, axis=1), np.stack(residuals, axis=1), starts), routers


def recalls(states: States, routers: dict[int, Router], maps: Maps, layer: int, point: Point) -> float:
    column = LAYERS.index(layer)
    rows = states.at(point, column)
    assert rows is not None
    used = ranking(routers[layer].logits(states.inputs[:, column]), TOP_K)
    found: LinearMap = maps[point, layer]
    return recall(found.scores(rows), used, TOP_K)


def test_where_nothing_changes_between_layers_the_untrained_guess_is_as_good_as_attention_is_weak() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.0)
    quiet = States(states.inputs, states.inputs / np.stack([routers[i].gain for i in LAYERS]), states.starts)
    assert recalls(quiet, routers, untrained(routers), 5, Point.ENTRY) == 1.0


def test_the_norms_gain_is_exchanged() -> None:
    states, routers = stream(np.random.default_rng(0), change=0.1)
    maps = untrained(routers)
    assert recalls(states, routers, maps, 5, Point.BEFORE) > 0.6  # attention changes what chance would make 0.25


def test_first_layers_have_no_guess_from_before() -> None:
    _, routers = stream(np.random.default_rng(0), change=0.3)
    assert set(untrained(routers)) == {
        *((Point.ENTRY, layer) for layer in LAYERS), (Point.BEFORE, 5), (Point.BEFORE, 6), (Point.EARLIER, 6),
    }  # fmt: skip


def test_a_silenced_channel_stays_silent() -> None:
    random = np.random.default_rng(0)
    routers = {1: router(random), 2: router(random)}
    routers[1].gain[3] = 0.0
    assert untrained(routers)[Point.BEFORE, 2].weight[3] == pytest.approx(np.zeros(EXPERTS))
