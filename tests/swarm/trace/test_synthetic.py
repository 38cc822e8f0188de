"""Synthetic traces: repeatable, of the right shape, and with the published curves of the models they imitate."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moehive.swarm.trace.routing import RoutingTrace
from moehive.swarm.trace.synthetic import FAMILIES, synthesize


def lru_rate(trace: RoutingTrace, resident: float) -> float:
    """LRU as it was published: a token's experts of all layers at once, against the cache before the token."""
    tokens, layers, _ = trace.experts.shape
    keys = trace.experts + np.arange(layers)[None, :, None] * trace.num_experts  # [N, L, K]
    slots, last, hits = resident * layers * trace.num_experts, np.full(layers * trace.num_experts, -1), []
    for token in range(tokens):
        used = keys[token].ravel()
        newer = np.array([(last > last[key]).sum() + ((last == last[key]).sum() / 2) for key in used])
        if token >= tokens // 8:
            hits.append(((last[used] >= 0) & (newer < slots)).mean())
        last[used] = token
    return float(np.mean(hits))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "olmoe-1b-7b"])
def test_a_family_has_its_published_curve(name: str) -> None:
    family = FAMILIES[name]
    layers = max(3, 96 // family.experts)
    trace = synthesize(name, layers=layers, sessions=4, prompt=0, answer=150)
    found = [lru_rate(trace, share) for share in family.curves]
    assert found == pytest.approx([lru for lru, _, _ in family.curves.values()], abs=0.05)
    assert all(low < high for low, high in pairwise(found))


def test_the_shape_is_the_models_and_a_seed_repeats() -> None:
    first, again, other = (synthesize("phi-3.5-moe", sessions=2, prompt=6, answer=3, seed=seed) for seed in (1, 1, 2))
    assert first.experts.shape == (18, 32, 2)
    assert first.tokens.tolist() == [6, 1, 1, 1] * 2
    assert np.flatnonzero(first.starts).tolist() == [0, 4]
    assert np.array_equal(first.experts, again.experts)
    assert not np.array_equal(first.experts, other.experts)
    assert all(len(set(chosen)) == 2 for chosen in first.experts.reshape(-1, 2).tolist())
    assert synthesize("phi-3.5-moe", prompt=0, answer=2).tokens.tolist() == [1, 1]
