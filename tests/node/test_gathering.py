"""Waiting for requests that are about to come: where most are missing, for a moment, and not in vain for ever."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moehive.node.gathering import MOST, Gathering, answered, gathered, patience

BATCH = answered(Gathering(), requests=30, waiting=2, seconds=0.03125, now=100.0)
states = st.builds(
    Gathering,
    in_flight=st.integers(0, 99),
    until=st.floats(0, 100),
    skip=st.integers(0, 64),
    failures=st.integers(0, 9),
)


def test_a_few_wait_for_the_many_that_were_just_answered() -> None:
    assert BATCH.in_flight == 32
    assert patience(BATCH, 2, 100.0) == 0.03125
    assert patience(BATCH, 15, 100.01) < patience(BATCH, 15, 100.0)


def test_half_of_them_is_enough() -> None:
    assert patience(BATCH, 16, 100.0) == 0.0


def test_waiting_is_over_when_the_last_batch_would_be() -> None:
    assert patience(BATCH, 2, 100.03125) == 0.0
    slow = answered(Gathering(), requests=30, waiting=2, seconds=3.0, now=100.0)
    assert patience(slow, 2, 100.0 + MOST) == 0.0


@given(states, st.integers(0, 9), st.floats(0, 1), st.floats(0, 100), st.floats(0, 1))
def test_a_lone_request_never_waits(state: Gathering, waiting: int, seconds: float, now: float, later: float) -> None:
    alone = answered(state, requests=1, waiting=0, seconds=seconds, now=now)
    assert patience(alone, waiting, now + later) == 0.0


@given(states, st.integers(0, 200), st.floats(0, 200))
def test_nobody_waits_longer_than_allowed_or_where_most_are_there(state: Gathering, waiting: int, now: float) -> None:
    seconds = patience(state, waiting, now)
    assert 0.0 <= seconds <= max(state.until - now, 0.0)
    assert not seconds or 2 * waiting < state.in_flight


def test_waiting_in_vain_becomes_rare_and_success_ends_that() -> None:
    state, begun, waits = BATCH, 0, []
    while begun < 200:
        if patience(state, 2, 100.0):
            waits.append(begun)
            state = gathered(state, 2)
        state = answered(state, requests=2, waiting=30, seconds=0.03125, now=100.0)
        begun += 1
    pauses = [later - earlier for earlier, later in pairwise(waits)]
    assert pauses == [2, 4, 8, 16, 32, 64, 64]
    assert gathered(state, 16).failures == 0
    assert patience(replace(gathered(state, 16), skip=0), 2, 100.0) > 0.0
