"""Who is to blame where two computations disagree: nobody without proof."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.trust import Comparison, Verdict, judge, second_lied

errors = st.none() | st.floats(0, 2) | st.just(math.inf) | st.just(math.nan)


@given(st.builds(Comparison, errors, errors, errors), st.floats(1e-6, 0.1))
def test_only_what_was_computed_here_is_proof(comparison: Comparison, tolerance: float) -> None:
    verdict = judge(comparison, tolerance)
    if verdict is Verdict.LIED:
        assert comparison.own is not None
        assert comparison.own > tolerance
    if comparison.own is None:
        assert verdict is not Verdict.LIED
    if second_lied(comparison, tolerance):
        assert comparison.second_peer_own is not None


def test_verdicts() -> None:
    assert judge(Comparison(), 0.01) is Verdict.UNCHECKED
    assert judge(Comparison(second_peer=0.001), 0.01) is Verdict.AGREES
    assert judge(Comparison(second_peer=0.1), 0.01) is Verdict.DISPUTED
    assert judge(Comparison(second_peer=0.1, own=0.001), 0.01) is Verdict.AGREES  # the second one was wrong
    assert judge(Comparison(second_peer=0.1, own=0.1), 0.01) is Verdict.LIED
    assert judge(Comparison(second_peer=0.0, own=0.1), 0.01) is Verdict.LIED  # both lied alike
    assert judge(Comparison(second_peer=math.nan), 0.01) is Verdict.DISPUTED  # so it is computed here
    assert judge(Comparison(second_peer=0.0, own=math.nan), 0.01) is Verdict.UNCHECKED  # the truth itself overflows
    assert judge(Comparison(second_peer=0.0, own=math.inf), 0.01) is Verdict.LIED
    assert second_lied(Comparison(second_peer=math.nan, own=0.0, second_peer_own=math.inf), 0.01)
