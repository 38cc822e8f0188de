"""What a peer's past says about how much to ask for, and how long to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.swarm.policy.pace import (
    FIRST_TIMEOUT,
    MAX_DEPTH,
    MAX_TIMEOUT,
    MIN_DEPTH,
    MIN_TIMEOUT,
    STALLED,
    Pace,
    after_answer,
    after_asking,
    after_busy,
    after_chunk,
    after_release,
    after_timeout,
)


def sending(rate: float, *, seconds: float = 5.0, rtt: float = 0.02) -> Pace:
    """A peer that has sent chunks at `rate` bytes per second for a while."""
    pace, now = after_asking(after_answer(Pace(), rtt), 0.0, idle=True), 0.0
    while now < seconds:
        now += CHUNK_SIZE / rate
        pace = after_chunk(pace, CHUNK_SIZE, CHUNK_SIZE / rate, now, more=True)
    return pace


@pytest.mark.parametrize("rate", [1e6, 10e6, 50e6, 300e6])
def test_the_rate_is_measured(rate: float) -> None:
    assert sending(rate).rate == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    ("rate", "rtt", "depth"),
    [
        (1e6, 0.02, MIN_DEPTH),
        (10e6, 0.02, 5),  # 10 MB/s x 0.52 s = 5.2 MB = 4.96 MiB
        (50e6, 0.02, 25),
        (50e6, 0.1, 29),
        (1e9, 0.02, MAX_DEPTH),
    ],
)
def test_depth_by_hand(rate: float, rtt: float, depth: int) -> None:
    assert sending(rate, rtt=rtt).depth == depth


def test_it_is_always_between_two_and_thirty_two_chunks_of_half_a_second_and_a_round_trip() -> None:
    assert [sending(rate, seconds=20.0).depth for rate in (0.2e6, 1e6, 1e10)] == [2, 2, 32]
    assert Pace(received=20 * CHUNK_SIZE, busy=1.0, rtt=0.3).depth == 16  # 20 chunks a second, for 0.5 s + 0.3 s


def test_a_new_speed_counts_after_a_second_or_two() -> None:
    pace = sending(50e6)
    now = pace.heard
    for _ in range(8):  # at 4 MB/s: two seconds
        now += CHUNK_SIZE / 4e6
        pace = after_chunk(pace, CHUNK_SIZE, 0.25, now, more=True)
    assert pace.rate < 12e6


def test_idle_time_says_nothing() -> None:
    pace = sending(50e6)
    later = after_asking(after_release(pace), pace.heard + 3600.0, idle=True)
    assert later.rate == pace.rate


def test_timeouts() -> None:
    assert Pace().timeout == FIRST_TIMEOUT
    fast, slow = sending(50e6), sending(0.5e6, seconds=60.0)
    assert fast.timeout == MIN_TIMEOUT
    assert slow.timeout == pytest.approx(4 * CHUNK_SIZE / 0.5e6)
    assert after_timeout(fast, 9.0).timeout == 2 * MIN_TIMEOUT
    assert after_timeout(after_timeout(fast, 9.0), 9.0).timeout == 4 * MIN_TIMEOUT


def test_after_a_timeout_one_chunk_at_a_time_until_they_come_again() -> None:
    pace = after_timeout(sending(50e6), 9.0)
    assert pace.depth == 1
    for expected in range(2, 6):
        pace = after_chunk(pace, CHUNK_SIZE, 0.02, pace.heard + 0.02, more=True)
        assert pace.depth == expected
    assert pace.timeout == MIN_TIMEOUT


def test_a_busy_peer_is_asked_for_half_as_much_and_others_are_preferred() -> None:
    pace = after_busy(sending(50e6), 24)
    assert pace.depth == 12
    assert 0 < pace.reluctance < after_busy(pace, 12).reluctance
    assert after_chunk(pace, CHUNK_SIZE, 0.02, pace.heard + 0.02, more=True).reluctance == 0
    assert after_busy(pace, 0).depth == 1


def test_a_connection_is_given_up_after_long_silence_only_while_something_is_due() -> None:
    pace = after_asking(sending(50e6), 10.0, idle=False)
    since = pace.quiet_since
    assert since is not None
    assert not pace.stalled(since + STALLED - 0.1)
    assert pace.stalled(since + STALLED)
    assert not after_release(pace).stalled(since + 1000)
    late = after_asking(after_timeout(pace, 12.0), 12.5, idle=True)
    assert late.stalled(since + STALLED)  # it is asked again, but owes since then


@given(st.lists(st.sampled_from(["ask", "chunk", "timeout", "busy", "answer", "release"])), st.data())
def test_bounds_hold_whatever_happens(events: list[str], data: st.DataObject) -> None:
    pace, now = Pace(), 1000.0
    for event in events:
        now += data.draw(st.floats(-5.0, 100.0))  # clocks jump
        match event:
            case "ask":
                pace = after_asking(pace, now, idle=data.draw(st.booleans()))
            case "chunk":
                waited, more = data.draw(st.floats(-5.0, 100.0)), data.draw(st.booleans())
                pace = after_chunk(pace, data.draw(st.integers(1, CHUNK_SIZE)), waited, now, more=more)
            case "timeout":
                pace = after_timeout(pace, now)
            case "busy":
                pace = after_busy(pace, data.draw(st.integers(0, 40)))
            case "answer":
                pace = after_answer(pace, data.draw(st.floats(0.0001, 10.0)))
            case _:
                pace = after_release(pace)
        assert 1 <= pace.depth <= MAX_DEPTH
        assert MIN_TIMEOUT <= pace.timeout <= MAX_TIMEOUT
        assert pace.rate >= 0
