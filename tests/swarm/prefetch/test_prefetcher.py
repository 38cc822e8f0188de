"""What the prefetcher remembers of the tokens before, against the whole sequence seen at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from moehive.protocol.ids import ExpertKey
from moehive.swarm.prefetch.attending import HEADS, MIXED, SIZE, WIDTH, WINDOW, Asker, Memory, Reader
from moehive.swarm.prefetch.fitting import features_of
from moehive.swarm.prefetch.history import Floats
from moehive.swarm.prefetch.predictors import LinearMap, Point, Predictor
from moehive.swarm.prefetch.prefetcher import Prefetcher
from moehive.swarm.prefetch.replay import SimulatedTier
from moehive.swarm.tiers.policy import Lru

from .test_fitting import EXPERTS, HIDDEN, LAYERS, TOP_K, stream

PROMPT = WINDOW // 3


@dataclass(frozen=True, slots=True, eq=False)
class Watched(Predictor):
    """Notes what guesses were made from."""

    asked: dict[tuple[Point, int], list[Floats]] = field(default_factory=dict)

    def features(self, point: Point, layer: int, row: Floats, history: Floats, memory: Memory) -> Floats | None:
        found = super(Watched, self).features(point, layer, row, history, memory)
        if found is not None:
            self.asked.setdefault((point, layer), []).append(found)
        return found


def a_predictor() -> Watched:
    random = np.random.default_rng(3)

    def drawn(*shape: int) -> Floats:
        return (random.standard_normal(shape) / 2).astype(np.float32)

    maps = {
        (point, layer): LinearMap(
            drawn(HIDDEN + MIXED, EXPERTS), drawn(EXPERTS), None,
            Asker(drawn(HIDDEN, WIDTH), drawn(WIDTH), drawn(WIDTH + HIDDEN, MIXED), drawn(MIXED)),
        )
        for column, layer in enumerate(LAYERS) for point in Point if column >= point.ahead
    }  # fmt: skip
    readers = {layer: Reader(drawn(HIDDEN, 2 * WIDTH), drawn(HEADS, SIZE)) for layer in LAYERS}
    return Watched(maps, TOP_K, HIDDEN, readers)


def test_guesses_are_made_from_what_the_tokens_of_this_session_left() -> None:
    """Another session came before; then a prompt in one call, then token after token, further than can be read."""
    states, _ = stream(np.random.default_rng(0), change=0.3, tokens=2 * PROMPT + WINDOW + 9)
    states.starts[PROMPT] = True
    predictor = a_predictor()
    tier = SimulatedTier(Lru[ExpertKey](), slots=3, load_seconds=1.0)
    prefetcher = Prefetcher(predictor, tier, LAYERS, clock=lambda: 0.0)
    calls = [slice(0, PROMPT), slice(PROMPT, 2 * PROMPT)]
    calls += [slice(token, token + 1) for token in range(2 * PROMPT, len(states.starts))]
    for call in calls:
        for column, layer in enumerate(LAYERS):
            prefetcher.entering(layer, states.residuals[call, column].astype(np.float32))
            prefetcher.computing(layer, states.inputs[call, column].astype(np.float32), list(range(TOP_K)))
    assert predictor.asked.keys() == predictor.maps.keys()
    for (point, layer), asked in predictor.asked.items():
        right = features_of(predictor, point, layer, LAYERS.index(layer), states)
        assert right is not None
        shadow = right[2 * PROMPT + 1 :: 4]  # at first, guesses are made only to see what they would be worth
        assert np.array(asked) == pytest.approx(shadow, abs=1e-3)
