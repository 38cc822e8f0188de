"""The tiers' policy on traces: recorded ones of the demo model, and synthetic ones like published models."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moehive.swarm.trace.files import read_trace
from moehive.swarm.trace.routing import RoutingTrace
from moehive.swarm.trace.scoring import Scores, fits_of, mark, score, slots_of
from moehive.swarm.trace.synthetic import FAMILIES, synthesize

DEMO = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
LAYERS = {8: 6, 16: 6, 60: 4, 64: 4, 128: 3}  # of the synthetic traces, by the family's experts
NAMES = (
    "demo",
    "mixtral-8x7b",
    "phi-3.5-moe",
    "qwen3-30b-a3b",
    "deepseek-v2-lite",
    "qwen1.5-moe-a2.7b",
    "qwen2-57b-a14b",
)
ASKED = 0.30  # of the way from LRU to Belady

# What is reached elsewhere, less than a point of it: it is not to get worse. Demo and Mixtral at 25 % have room for
# exactly one token's experts. In the synthetic traces layers and experts are independent, so that nothing but an
# expert's own past says anything about it.
REACHED = {
    ("demo", 0.25): 0.08,
    ("mixtral-8x7b", 0.25): 0.07,
    ("qwen2-57b-a14b", 0.25): 0.235,
}


@cache
def trace_of(name: str) -> RoutingTrace:
    if name == "demo":
        return read_trace(DEMO)
    layers = LAYERS[FAMILIES[name].experts]
    return synthesize(name, layers=layers, sessions=4, prompt=64, answer=448)  # of 512 tokens, as the curves are


@cache
def scores_of(name: str, resident: float) -> Scores:
    trace = trace_of(name)
    return score(trace, slots_of(trace, resident))


@pytest.mark.parametrize("resident", [0.25, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_the_policy_goes_its_part_of_the_way_from_lru_to_the_optimum(name: str, resident: float) -> None:
    scores = scores_of(name, resident)
    assert scores.lru.hit_rate - 0.01 <= scores.lfru.hit_rate <= scores.belady.hit_rate
    assert scores.closed >= REACHED.get((name, resident), ASKED)


@pytest.mark.parametrize(("name", "resident"), REACHED)
def test_where_it_does_not_even_knowing_the_next_layer_would_not_help(name: str, resident: float) -> None:
    trace, scores = trace_of(name), scores_of(name, resident)
    marks = mark(trace, scores.slots, fits_of(trace))
    assert scores.share(marks.fitted) < ASKED
    assert scores.closed < scores.share(marks.foreseen) < ASKED
