import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.prefetch.session import OLD_TOKENS, begin_session, coverage, likely_experts
from moehive.swarm.trace.synthetic import synthesize


def test_a_first_prompt_finds_nothing() -> None:
    assert begin_session({}, 0.0) == ({}, 0.0)


def test_few_earlier_tokens_keep_their_weight() -> None:
    assert begin_session({1: 4.0}, 8.0) == ({1: 4.0}, 8.0)


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1e6)), st.floats(OLD_TOKENS, 1e6))
def test_many_earlier_tokens_weigh_like_a_few_and_keep_their_shares(uses: dict[int, float], tokens: float) -> None:
    scaled, left = begin_session(uses, tokens)
    assert left == pytest.approx(OLD_TOKENS)
    for expert, count in uses.items():
        assert scaled[expert] / left == pytest.approx(count / tokens)


def test_what_most_tokens_used_comes_first() -> None:
    assert likely_experts({0: {3: 2.0, 4: 9.0}, 5: {1: 5.0, 2: 0.0}}, {0: 10.0, 5: 10.0}) == [(0, 4), (5, 1), (0, 3)]


def test_coverage_counts_what_was_missing_only() -> None:
    answer = np.array([[[0, 1]], [[1, 2]], [[2, 3]]])
    assert coverage([(7, 2)], [(7, 1)], answer, (7,)) == 0.5
    assert coverage([], [(7, expert) for expert in range(4)], answer, (7,)) == 1.0
    assert coverage([(6, 2)], [(7, 1)], answer, (7,)) == 0.0


def test_a_prompt_tells_most_of_its_answer_and_more_than_other_sessions_do() -> None:
    """Routing as published models have it: a quarter of the experts, by the prompt, or by the sessions before."""
    trace = synthesize("qwen3-30b-a3b", layers=2, sessions=4, prompt=128, answer=32)
    by_prompt, by_others = [], []
    for start in range(160, trace.count, 160):
        answer = trace.experts[start + 128 : start + 160]
        for chosen, found in ((trace.experts[start : start + 128], by_prompt), (trace.experts[:start], by_others)):
            found.append(coverage(quarter(chosen, trace.layers, trace.num_experts), [], answer, trace.layers))
    assert min(by_prompt) > 0.5
    assert np.mean(by_prompt) > np.mean(by_others) + 0.03


def quarter(used: np.ndarray, layers: tuple[int, ...], experts: int) -> list[tuple[int, int]]:
    counts = {
        layer: dict(enumerate(np.bincount(used[:, column].ravel(), minlength=experts).astype(float).tolist()))
        for column, layer in enumerate(layers)
    }
    ranked = likely_experts(counts, dict.fromkeys(layers, float(len(used))))
    return ranked[: len(layers) * experts // 4]
