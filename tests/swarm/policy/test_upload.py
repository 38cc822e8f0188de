"""Turns, places in the queue, and the token bucket: fairness by counting, bounds by Hypothesis."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import PeerId
from moehive.swarm.policy.upload import (
    BURST,
    MAX_RETRY,
    MIN_RETRY,
    Bucket,
    Place,
    Running,
    UploadLimits,
    draw,
    find_place,
    free_slots,
    next_turn,
    retry_after,
)

LIMITS = UploadLimits(slots=2, slots_per_peer=1, waiting=4, waiting_per_peer=3, slot_seconds=5.0, slow=1)
A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
peers = st.sampled_from([A, B, C, PeerId("D"), PeerId("E")])


# --- turns ------------------------------------------------------------------------------------------------------------


def test_slots_are_taken_and_given_back() -> None:
    assert free_slots([], LIMITS, 0.0) == 2
    assert free_slots([Running(A, 0.0)], LIMITS, 0.0) == 1
    assert next_turn([C], [Running(A, 0.0), Running(B, 0.0)], {}, LIMITS, 4.9) is None


def test_a_slow_upload_gives_its_slot_to_somebody_else() -> None:
    running = [Running(A, 0.0), Running(B, 3.0)]
    assert free_slots(running, LIMITS, 5.0) == 1
    assert next_turn([C], running, {}, LIMITS, 5.0) == 0


def test_only_so_many_slow_uploads_go_on_without_a_slot() -> None:
    running = [Running(A, 0.0), Running(B, 0.0)]
    assert free_slots(running, LIMITS, 60.0) == 1  # one of them counts again
    assert free_slots([*running, Running(C, 50.0)], LIMITS, 60.0) == 0


def test_a_peer_with_a_slow_upload_gets_no_second_one() -> None:
    assert next_turn([A], [Running(A, 0.0)], {}, LIMITS, 60.0) is None
    assert next_turn([A, B], [Running(A, 0.0)], {}, LIMITS, 60.0) == 1


def test_whoever_had_no_turn_for_longest_is_next() -> None:
    assert next_turn([A, A, B], [], {A: 7, B: 3}, LIMITS, 0.0) == 2
    assert next_turn([A, A, B], [], {A: 7, B: 8}, LIMITS, 0.0) == 0
    assert next_turn([A, B, C], [], {A: 7, B: 8}, LIMITS, 0.0) == 2  # a newcomer
    assert next_turn([B, A], [], {}, LIMITS, 0.0) == 0  # the older request


@given(st.lists(st.integers(1, 6), min_size=6, max_size=12), st.integers(1, 5))
def test_where_more_wait_than_fit_everybody_gets_as_many_turns_as_the_others(requests: list[int], slots: int) -> None:
    """However many requests each has open."""
    limits = UploadLimits(slots=slots, slots_per_peer=2, waiting=999)
    waiting = [PeerId(str(number)) for number, count in enumerate(requests) for _ in range(count)]
    running: deque[PeerId] = deque()
    turns: dict[PeerId, int] = {}
    served: Counter[PeerId] = Counter()
    for number in range(8 * len(requests)):
        index = next_turn(waiting, [Running(peer, 0.0) for peer in running], turns, limits, 0.0)
        if index is not None:
            peer = waiting.pop(index)
            turns[peer] = number
            served[peer] += 1
            running.append(peer)
        if index is None or len(running) == slots:
            waiting.append(running.popleft())  # it asks for its next chunk at once
    counts = [served[PeerId(str(number))] for number in range(len(requests))]
    assert max(counts) - min(counts) <= 2


@given(st.lists(peers, max_size=9), st.lists(peers, max_size=9), st.floats(0, 100))
def test_a_turn_never_breaks_a_limit(waiting: list[PeerId], at_work: list[PeerId], now: float) -> None:
    running = [Running(peer, 10.0 * number) for number, peer in enumerate(at_work)]
    index = next_turn(waiting, running, {}, LIMITS, now)
    fresh = [upload for upload in running if now - upload.since < LIMITS.slot_seconds]
    if index is not None:
        assert len(fresh) < LIMITS.slots
        assert len(running) < LIMITS.slots + LIMITS.slow
        assert at_work.count(waiting[index]) < LIMITS.slots_per_peer
        assert waiting.index(waiting[index]) == index
    else:
        free = free_slots(running, LIMITS, now)
        assert free <= 0 or all(at_work.count(peer) >= LIMITS.slots_per_peer for peer in waiting)


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_while_there_is_room() -> None:
    assert find_place([], A, LIMITS) == Place()
    assert find_place([A, A], A, LIMITS) == Place()
    assert find_place([A, A, A], A, LIMITS) == Place(refused=True)
    assert find_place([A, A, A], B, LIMITS) == Place()


def test_in_a_full_list_the_greediest_makes_room() -> None:
    assert find_place([A, A, A, B], C, LIMITS) == Place(displaces=2)
    assert find_place([A, A, B, A], B, LIMITS) == Place(displaces=3)
    assert find_place([A, A, B, B], A, LIMITS) == Place(refused=True)
    assert find_place([A, A, B, B], C, LIMITS) == Place(displaces=1)
    assert find_place([A, B, C, PeerId("D")], PeerId("E"), LIMITS) == Place(refused=True)


@given(st.lists(peers, max_size=200))
def test_the_list_is_bounded_and_nobody_is_kept_out_by_others(arrivals: list[PeerId]) -> None:
    waiting: list[PeerId] = []
    for peer in arrivals:
        place = find_place(waiting, peer, LIMITS)
        if place.displaces is not None:
            assert not place.refused
            del waiting[place.displaces]
        if not place.refused:
            waiting.append(peer)
        elif peer not in waiting:  # then all places belong to peers with one request each
            assert len(set(waiting)) == LIMITS.waiting
        assert len(waiting) <= LIMITS.waiting
        assert max(Counter(waiting).values()) <= LIMITS.waiting_per_peer


@given(st.integers(0, 10_000), st.floats(0, 1e6))
def test_what_a_refused_peer_is_told_is_sane(waiting: int, seconds: float) -> None:
    assert MIN_RETRY <= retry_after(waiting, seconds, LIMITS) <= MAX_RETRY


def test_the_wait_is_what_those_in_front_take() -> None:
    assert retry_after(4, 0.5, LIMITS) == pytest.approx(1.0)


# --- rate -------------------------------------------------------------------------------------------------------------


@given(
    st.floats(1.0, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0.0, 2.0)), min_size=1, max_size=50),
)
def test_over_any_stretch_no_more_leaves_than_rate_and_burst(rate: float, sends: list[tuple[int, float]]) -> None:
    """Each sender waits as it is told and then sends; `pause` seconds later comes the next one."""
    bucket, now = Bucket(), 0.0
    left: list[tuple[float, int]] = []
    for size, pause in sends:
        bucket, wait = draw(bucket, size, rate, now)
        left.append((now + wait, size))
        now += pause
    for index, (start, _) in enumerate(left):
        sent = 0
        for when, size in left[index:]:
            sent += size
            # A piece may go when it is paid for: what leaves in [start, when] is at most rate x time + burst + itself.
            assert sent - left[index][1] <= rate * (when - start) + rate * BURST + 1e-6 * sent + 1e-3


def test_whoever_waits_as_told_gets_the_whole_rate() -> None:
    bucket, now = Bucket(), 0.0
    for _ in range(100):
        bucket, wait = draw(bucket, 1000, 10_000.0, now)
        now += wait
    assert now == pytest.approx(100 * 1000 / 10_000, rel=0.02)


def test_a_pause_earns_one_burst_at_most() -> None:
    bucket, _ = draw(Bucket(), 1000, 1000.0, 0.0)
    bucket, wait = draw(bucket, 1000, 1000.0, 1e9)
    assert wait == pytest.approx(1.0 - BURST)


def test_a_clock_that_jumps_back_gives_and_costs_nothing() -> None:
    bucket, before = draw(Bucket(), 1000, 1000.0, 1e9)
    bucket, after = draw(bucket, 1000, 1000.0, 0.0)
    assert after == pytest.approx(before + 1.0)
    _, later = draw(bucket, 0, 1000.0, 10.0)
    assert later == 0.0
