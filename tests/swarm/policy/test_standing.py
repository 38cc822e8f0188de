"""How peers rise and fall: a lie bans, a failure only delays, and neither is confused with the other."""

from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.standing import (
    FIRST_BAN,
    FIRST_PAUSE,
    MAX_BAN,
    MAX_PAUSE,
    MIN_WAIT,
    Offence,
    Standing,
    after_offence,
    after_return,
    after_success,
    is_avoided,
    is_banned,
)

LIE, FAILURE, BUSY = Offence.LIE, Offence.FAILURE, Offence.BUSY
events = st.lists(st.tuples(st.sampled_from([LIE, FAILURE, BUSY, None]), st.floats(0, 100)), max_size=30)


def after(events: list[tuple[Offence | None, float]]) -> tuple[Standing, float]:
    """The standing after events with times between them; None is a success."""
    standing, now = Standing(), 0.0
    for offence, wait in events:
        now += wait
        standing = after_success(standing, now) if offence is None else after_offence(standing, offence, now)
    return standing, now


@given(events)
def test_failures_never_ban_and_lies_always_do(events: list[tuple[Offence | None, float]]) -> None:
    standing, now = after(events)
    assert standing.lies == sum(offence is LIE for offence, _ in events)
    if LIE not in [offence for offence, _ in events]:
        assert not is_banned(standing, now)
    assert is_banned(after_offence(standing, LIE, now), now)


@given(events)
def test_avoidance_ends(events: list[tuple[Offence | None, float]]) -> None:
    standing, now = after(events)
    assert standing.avoid_until <= now + max(MAX_BAN, MAX_PAUSE)
    assert not is_avoided(standing, standing.avoid_until)


@given(events)
def test_who_announces_itself_anew_may_be_tried_at_once_unless_it_lied_or_asked_to_be_left_alone(
    events: list[tuple[Offence | None, float]],
) -> None:
    standing, now = after(events)
    returned = after_return(standing, now)
    assert (returned.lies, returned.failures) == (standing.lies, standing.failures)
    assert is_banned(returned, now) == is_banned(standing, now)
    if standing.failures and not is_banned(standing, now):
        assert not is_avoided(returned, now)
    else:
        assert returned == standing


@given(events)
def test_an_offence_never_shortens_avoidance(events: list[tuple[Offence | None, float]]) -> None:
    standing, now = after(events)
    for offence in Offence:
        assert after_offence(standing, offence, now).avoid_until >= standing.avoid_until


def test_bans_and_pauses_double() -> None:
    lies = reduce(lambda standing, _: after_offence(standing, LIE, 0.0), range(3), Standing())
    assert lies.avoid_until == 4 * FIRST_BAN
    failures = reduce(lambda standing, _: after_offence(standing, FAILURE, 0.0), range(3), Standing())
    assert failures.avoid_until == 4 * FIRST_PAUSE


@pytest.mark.parametrize(("offence", "most"), [(LIE, MAX_BAN), (FAILURE, MAX_PAUSE)])
def test_ten_thousand_offences_are_not_too_many(offence: Offence, most: float) -> None:
    standing = reduce(lambda standing, _: after_offence(standing, offence, 0.0), range(10_000), Standing())
    assert standing.avoid_until == most


def test_a_success_ends_a_pause_but_no_ban() -> None:
    assert not is_avoided(after_success(after_offence(Standing(), FAILURE, 0.0), 0.0), 0.0)
    assert is_banned(after_success(after_offence(Standing(), LIE, 0.0), 0.0), 0.0)


def test_a_ban_that_is_over_is_over() -> None:
    served = after_offence(Standing(), LIE, 0.0)
    failed = after_offence(served, FAILURE, FIRST_BAN)
    assert is_avoided(failed, FIRST_BAN)
    assert not is_banned(failed, FIRST_BAN)
    assert after_success(failed, FIRST_BAN) == Standing(lies=1)  # the next one takes longer


@pytest.mark.parametrize(("asked", "given"), [(0.0, MIN_WAIT), (5.0, 5.0), (1e9, MAX_PAUSE)])
def test_a_busy_peer_says_how_long_within_reason_and_did_nothing_wrong(asked: float, given: float) -> None:
    standing = reduce(lambda standing, _: after_offence(standing, BUSY, 0.0, wait=asked), range(5), Standing())
    assert standing.avoid_until == given
    assert standing.failures == 0
