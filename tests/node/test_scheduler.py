"""Admission and batches: bounded, in order, nobody starves."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from moehive.node.scheduler import QueueFacts, QueueLimits, Refuse, Waiting, admit, arrived, computed, next_batch
from moehive.protocol.errors import RefusalCode

LIMITS = QueueLimits(requests=4, queued_bytes=100, batch_rows=10)
clients = st.sampled_from(["alice", "bob", "carol"])
queues = st.lists(st.builds(Waiting, st.sampled_from("abc"), st.integers(1, 15), clients, st.booleans()), max_size=20)
served_rows = st.dictionaries(clients, st.floats(0, 100))


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


def test_a_client_cannot_fill_the_queue_alone() -> None:
    limits = QueueLimits(client_requests=2, client_bytes=50)
    assert admit(QueueFacts(9, 0, 0, 0.0, client_requests=1), limits, payload_bytes=1, deadline=1) is None
    for greedy in (QueueFacts(9, 0, 0, 0.0, client_requests=2), QueueFacts(9, 0, 0, 0.0, client_bytes=50)):
        refused = admit(greedy, limits, payload_bytes=1, deadline=1)
        assert refused is not None
        assert refused.code is RefusalCode.BUSY


def test_a_small_request_waits_for_small_ones_and_their_turns_only() -> None:
    limits = QueueLimits(slice_rows=10)
    found = QueueFacts(5, 0, rows=1020, seconds_per_row=0.01, small_rows=20)
    assert found.wait_of(True, limits) == (20 + 30) * 0.01
    assert found.wait_of(False, limits) == 1020 * 0.01
    assert admit(found, limits, payload_bytes=1, deadline=1.0, small=True) is None
    refused = admit(found, limits, payload_bytes=1, deadline=1.0, small=False)
    assert refused is not None
    assert refused.code is RefusalCode.DEADLINE


def test_a_queue_longer_than_its_limit_in_time_refuses_whatever_the_deadline() -> None:
    refused = admit(facts(rows=100, seconds_per_row=0.2), QueueLimits(wait=5.0), payload_bytes=1, deadline=600.0)
    assert refused == Refuse(RefusalCode.BUSY, 15.0)


@given(queues, st.booleans(), served_rows)
def test_a_batch_is_the_first_in_turn_and_its_like(queue: list[Waiting], small: bool, served: dict[str, float]) -> None:
    chosen = next_batch(queue, LIMITS, served, small=small)
    assert chosen == sorted(set(chosen))
    assert bool(chosen) is any(waiting.small is small for waiting in queue)
    assert all(queue[index].small is small for index in chosen)
    assert len({queue[index].key for index in chosen}) <= 1
    rows = sum(queue[index].rows for index in chosen)
    assert rows <= LIMITS.batch_rows or len(chosen) == 1
    if chosen:
        least = min(served.get(w.client, 0.0) for w in queue if w.small is small)
        first = min(i for i, w in enumerate(queue) if w.small is small and served.get(w.client, 0.0) == least)
        assert first in chosen  # the oldest of who was served least


@given(queues, served_rows)
def test_taking_batches_empties_the_queue(queue: list[Waiting], served: dict[str, float]) -> None:
    left, taken = list(queue), 0
    while left:
        chosen = next_batch(left, LIMITS, served) or next_batch(left, LIMITS, served, small=False)
        taken += len(chosen)
        left = [waiting for index, waiting in enumerate(left) if index not in chosen]
    assert taken == len(queue)


@given(st.lists(st.tuples(st.sampled_from(["arrive", "arrive", "compute"]), clients, st.integers(1, 9)), max_size=60))
def test_clients_that_wait_are_served_alike(steps: list[tuple[str, str, int]]) -> None:
    """Among clients that wait all the time, nobody gets ahead by more than a batch and its largest request."""
    served: dict[Hashable, float] = {}
    queue: list[Waiting] = []
    since: dict[str, float] = {}  # what a client had been served when it began to wait
    for step, client, rows in steps:
        if step == "arrive":
            served = arrived(served, client, {waiting.client for waiting in queue})
            if all(waiting.client != client for waiting in queue):
                since[client] = served[client]
            queue.append(Waiting(len(queue), rows, client))
        elif queue:
            chosen = next_batch(queue, LIMITS, served)
            batch = [queue[index] for index in chosen]
            queue = [waiting for index, waiting in enumerate(queue) if index not in chosen]
            waiting_now = {waiting.client for waiting in queue}
            served = computed(served, batch, waiting_now)
            levels = [served.get(one, 0.0) for one in waiting_now]
            assert not levels or max(levels) - min(levels) <= 2 * 9
    assert set(served) >= {waiting.client for waiting in queue}


def test_who_was_away_earns_nothing_by_it() -> None:
    served = arrived({"busy": 1000.0}, "new", {"busy"})
    assert served["new"] == 1000.0
    assert arrived({}, "first", set()) == {"first": 0.0}


def test_clients_without_requests_are_forgotten_unless_they_are_ahead() -> None:
    batch = [Waiting("k", 5, "a"), Waiting("k", 50, "b")]
    assert computed({"a": 0.0, "b": 0.0, "c": 10.0}, batch, {"c"}) == {"b": 50.0, "c": 10.0}
    assert computed({"a": 0.0}, batch, set()) == {}
