"""What answers say about a peer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.speed import Speed, after_answer, after_silence, expected_seconds, lateness

times = st.floats(0, 100)


def answered(speed: Speed, elapsed: float, times: int = 1, **facts: float) -> Speed:
    given = {"waited": 0.0, "computed": 0.004, "experts": 8, "rows": 8, "sent": 8192} | facts
    for _ in range(times):
        speed = after_answer(speed, elapsed=elapsed, **given)  # type: ignore[arg-type]
    return speed


@given(
    st.lists(
        st.tuples(times, times, times, st.integers(1, 64), st.integers(1, 4096), st.integers(0, 1 << 24)), max_size=30
    )
)
def test_whatever_a_peer_claims_expectations_stay_finite_and_within_what_was_measured(
    answers: list[tuple[float, float, float, int, int, int]],
) -> None:
    speed = Speed()
    for elapsed, waited, computed, experts, rows, sent in answers:
        speed = after_answer(
            speed,
            elapsed=elapsed,
            waited=waited,
            computed=computed,
            experts=experts,
            rows=max(rows, experts),
            sent=sent,
        )
    longest = max((elapsed for elapsed, *_ in answers), default=1.0)
    assert 0 <= speed.network <= max(longest, 1e-6) + 0.05
    assert 0 <= speed.waited + speed.computed <= 2 * longest + 1e-6
    assert 0 <= expected_seconds(speed, experts=1, rows=1) < float("inf")
    assert lateness(speed) >= 1.0
    assert len(speed.late) <= 64


def test_a_steady_peer_is_known_after_some_answers() -> None:
    speed = answered(Speed(), 0.010, times=30)
    assert expected_seconds(speed, experts=8, rows=8) == pytest.approx(0.010, rel=0.05)
    assert expected_seconds(speed, experts=4, rows=4) == pytest.approx(0.008, rel=0.05)
    assert expected_seconds(speed, experts=8, rows=8, in_flight=2) == pytest.approx(0.018, rel=0.05)
    assert lateness(speed) == pytest.approx(1.0, abs=0.05)


def test_who_claims_to_compute_longer_than_we_waited_gains_nothing() -> None:
    honest, boaster = answered(Speed(), 0.010, times=30), answered(Speed(), 0.010, times=30, computed=50.0)
    assert expected_seconds(boaster, experts=8, rows=8) == pytest.approx(
        expected_seconds(honest, experts=8, rows=8), rel=0.1
    )


def test_large_messages_tell_the_link_and_small_ones_the_round_trip() -> None:
    speed = answered(Speed(), 0.010, times=30)
    speed = answered(speed, 0.110, times=30, sent=1_000_000)
    assert speed.network == pytest.approx(0.006, rel=0.05)
    assert expected_seconds(speed, experts=8, rows=8, sent=2_000_000) == pytest.approx(0.210, rel=0.1)


def test_many_rows_tell_the_time_of_a_row() -> None:
    speed = answered(Speed(), 0.010, times=30)
    speed = answered(speed, 1.010, times=30, rows=1000, computed=1.004)
    assert expected_seconds(speed, experts=8, rows=2000) == pytest.approx(2.010, rel=0.05)
    assert expected_seconds(speed, experts=8, rows=8) < 0.5


def test_a_few_late_answers_move_the_quantile_and_one_does_not() -> None:
    speed = answered(Speed(), 0.010, times=63)
    assert lateness(answered(speed, 0.100)) < 1.2
    for _ in range(5):
        speed = answered(answered(speed, 0.010, times=8), 0.200)
    assert lateness(speed) > 2


def test_one_silence_counts_little_and_several_in_a_row_are_believed() -> None:
    known = answered(Speed(), 0.010, times=30)

    def expected(speed: Speed) -> float:
        return expected_seconds(speed, experts=8, rows=8)

    def silent(speed: Speed, times: int) -> Speed:
        for _ in range(times):
            speed = after_silence(speed, elapsed=0.050, experts=8, rows=8)
        return speed

    assert expected(silent(known, 1)) < 0.020
    assert expected(silent(known, 4)) == pytest.approx(0.050)
    assert expected(silent(known, 1000)) == pytest.approx(0.050)  # no more than what was seen
    again = answered(silent(known, 4), 0.010)
    assert expected(silent(again, 1)) - expected(again) < 0.010
    assert silent(known, 2).waited < after_silence(silent(known, 2), elapsed=0.050, experts=8, rows=8).waited
