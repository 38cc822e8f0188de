"""The tiers' policy on traces: recorded ones of the demo model, and synthetic ones like published models."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moehive.swarm.trace.files import read_trace
from moehive.swarm.trace.routing import RoutingTrace
from moehive.swarm.trace.scoring import score, slots_of
from moehive.swarm.trace.synthetic import FAMILIES, synthesize

DEMO = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
LAYERS = {8: 8, 16: 6, 60: 3, 64: 3, 128: 2}  # of the synthetic traces, by the family's experts


@cache
def trace_of(name: str) -> RoutingTrace:
    if name == "demo":
        return read_trace(DEMO)
    layers = LAYERS[FAMILIES[name].experts]
    return synthesize(name, layers=layers, sessions=2, prompt=64, answer=160)


@pytest.mark.parametrize("resident", [0.25, 0.5])
@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_the_policy_is_never_worse_than_lru(name: str, resident: float) -> None:
    trace = trace_of(name)
    scores = score(trace, slots_of(trace, resident))
    assert scores.lfru.hit_rate >= scores.lru.hit_rate - 0.01
    assert scores.lfru.hit_rate <= scores.belady.hit_rate
