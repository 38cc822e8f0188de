"""The tiers' policy on traces: recorded ones of the demo model, and synthetic ones like published models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from moehive.swarm.trace.files import read_trace
from moehive.swarm.trace.hindsight import Fitted
from moehive.swarm.trace.routing import RoutingTrace
from moehive.swarm.trace.scoring import Scores, fits_of, score, slots_of
from moehive.swarm.trace.synthetic import FAMILIES, synthesize

DEMO = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
LAYERS = {8: 8, 16: 8, 60: 4, 64: 4, 128: 3}  # of the synthetic traces, by the family's experts
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

# Where the past does not tell enough for that, the mark is what a fit to the trace itself reaches, less this.
SHORT = 0.06

# What is reached there, less than a point of it: it is not to get worse. Demo and Mixtral at 25 % have room for exactly
# one token's experts. In the synthetic traces layers and experts are independent, so that nothing but an expert's own
# past says anything about it.
REACHED = {
    ("demo", 0.25): 0.08,
    ("demo", 0.5): 0.345,
    ("mixtral-8x7b", 0.25): 0.04,
    ("qwen1.5-moe-a2.7b", 0.25): 0.27,
    ("qwen2-57b-a14b", 0.25): 0.25,
}


@cache
def trace_of(name: str) -> RoutingTrace:
    if name == "demo":
        return read_trace(DEMO)
    layers = LAYERS[FAMILIES[name].experts]
    return synthesize(name, layers=layers, sessions=2, prompt=64, answer=192)


@cache
def scores_of(name: str, resident: float) -> Scores:
    trace = trace_of(name)
    return score(trace, slots_of(trace, resident), cached_fits(name))


@cache
def cached_fits(name: str) -> Sequence[Fitted]:
    return fits_of(trace_of(name))


@pytest.mark.parametrize("resident", [0.25, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_the_policy_goes_its_part_of_the_way_from_lru_to_the_optimum(name: str, resident: float) -> None:
    scores = scores_of(name, resident)
    assert scores.lru.hit_rate - 0.01 <= scores.lfru.hit_rate <= scores.belady.hit_rate
    assert scores.closed >= min(ASKED, scores.closed_by_fit - SHORT)
    assert scores.closed >= REACHED.get((name, resident), ASKED)


def test_the_cells_that_miss_the_mark_are_those_whose_past_does_not_tell_enough() -> None:
    cells = [(name, resident) for name in NAMES for resident in (0.25, 0.5)]
    short = {cell for cell in cells if scores_of(*cell).closed < ASKED}
    untold = {cell for cell in cells if scores_of(*cell).closed_by_fit < ASKED}
    assert short == untold == {cell for cell, least in REACHED.items() if least < ASKED}
