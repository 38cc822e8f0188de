"""Admission and batches: bounded, in order, nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.node.scheduler import QueueFacts, QueueLimits, Waiting, admit, next_batch
from moehive.protocol.errors import RefusalCode

LIMITS = QueueLimits(requests=4, queued_bytes=100, batch_rows=10)
queues = st.lists(st.builds(Waiting, st.sampled_from("abc"), st.integers(1, 15)), max_size=20)


def facts(requests: int = 0, queued_bytes: int = 0, rows: int = 0, seconds_per_row: float = 0.0) -> QueueFacts:
    return QueueFacts(requests, queued_bytes, rows, seconds_per_row)


def test_an_idle_node_takes_what_fits() -> None:
    assert admit(facts(), LIMITS, payload_bytes=100, deadline=0.0) is None
    assert admit(facts(requests=3), LIMITS, payload_bytes=1, deadline=1.0) is None


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    for full in (facts(requests=4, rows=10, seconds_per_row=0.2), facts(queued_bytes=91, rows=10, seconds_per_row=0.2)):
        refused = admit(full, LIMITS, payload_bytes=10, deadline=60.0)
        assert refused is not None
        assert refused.code is RefusalCode.BUSY
        assert refused.retry_after == 2.0


def test_what_cannot_be_begun_in_time_is_refused_at_once() -> None:
    refused = admit(facts(rows=10, seconds_per_row=0.2), LIMITS, payload_bytes=1, deadline=1.5)
    assert refused is not None
    assert (refused.code, refused.retry_after) == (RefusalCode.DEADLINE, 0.5)


@given(
    st.builds(QueueFacts, st.integers(0, 9), st.integers(0, 200), st.integers(0, 99), st.floats(0, 1)),
    st.integers(0, 200),
    st.floats(0, 600),
)
def test_what_is_admitted_keeps_to_the_bounds(found: QueueFacts, payload_bytes: int, deadline: float) -> None:
    refused = admit(found, LIMITS, payload_bytes=payload_bytes, deadline=deadline)
    if refused is None:
        assert found.requests < LIMITS.requests
        assert found.queued_bytes + payload_bytes <= LIMITS.queued_bytes
        assert found.expected_wait <= deadline
    else:
        assert refused.retry_after > 0 or refused.code is RefusalCode.DEADLINE


@given(queues)
def test_a_batch_is_the_oldest_and_its_like(queue: list[Waiting]) -> None:
    chosen = next_batch(queue, LIMITS)
    assert chosen == sorted(set(chosen))
    assert (chosen[:1] == [0]) is bool(queue)  # the oldest never waits for younger ones
    assert len({queue[index].key for index in chosen}) <= 1
    rows = sum(queue[index].rows for index in chosen)
    assert rows <= LIMITS.batch_rows or len(chosen) == 1
    for index, waiting in enumerate(queue):
        if index not in chosen and waiting.key == queue[0].key:
            before = sum(queue[i].rows for i in chosen if i < index)
            assert before + waiting.rows > LIMITS.batch_rows  # left out only where there was no room


@given(queues)
def test_taking_batches_empties_the_queue(queue: list[Waiting]) -> None:
    left, taken = list(queue), 0
    while left:
        chosen = next_batch(left, LIMITS)
        taken += len(chosen)
        left = [waiting for index, waiting in enumerate(left) if index not in chosen]
    assert taken == len(queue)
