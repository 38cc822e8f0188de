"""The queue's sums are those of what waits, whatever came and went."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.swarm_fakes import MODEL, identity

from moehive.kernels.routing import Assignment
from moehive.node.compute import Work
from moehive.node.scheduler import QueueFacts
from moehive.node.waiting import Queued, RequestQueue
from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.request import LayerInput, build_request

CLIENTS = [identity(number).peer for number in (1, 2, 3)]


def queued(client: PeerId, tokens: int, *, size: int, since: float = 0.0, deadline: float = 60.0) -> Queued:
    call = LayerInput(0, torch.zeros(tokens, 4), torch.ones(tokens, 1), "sum")
    rows = Assignment(0, torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64))
    request = build_request(MODEL, call, [rows], deadline)
    work = Work.parse(request.message, bytearray(b"".join(request.payload)))
    return Queued.begin(work, client, size, since, small=tokens < 3)


def recount(waiting: list[Queued], client: PeerId) -> QueueFacts:
    mine = [one for one in waiting if one.client == client]
    return QueueFacts(
        requests=len(waiting),
        queued_bytes=sum(one.payload_bytes for one in waiting),
        rows=sum(one.waiting.rows for one in waiting),
        seconds_per_row=0.5,
        small_rows=sum(one.waiting.rows for one in waiting if one.waiting.small),
        client_requests=len(mine),
        client_bytes=sum(one.payload_bytes for one in mine),
    )


@given(
    st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(1, 4), st.integers(0, 99)), max_size=9),
    st.sets(st.integers(0, 8)),
)
def test_sums_are_those_of_what_waits(arrivals: list[tuple[PeerId, int, int]], taken: set[int]) -> None:
    async def run() -> None:
        queue = RequestQueue()
        waiting = [queued(client, tokens, size=size) for client, tokens, size in arrivals]
        for one in waiting:
            queue.add(one)
        indices = sorted(index for index in taken if index < len(waiting))
        assert queue.take(indices) == [waiting[index] for index in indices]
        left = [one for index, one in enumerate(waiting) if index not in indices]
        assert queue.waiting == [one.waiting for one in left]
        assert queue.small == sum(one.waiting.small for one in left)
        assert queue.only_small() is (bool(left) and all(one.waiting.small for one in left))
        assert set(queue.clients) == {one.client for one in left}
        for client in CLIENTS:
            assert queue.facts(client, 0.5) == recount(left, client)

    asyncio.run(run())


@pytest.mark.parametrize(("now", "late"), [(5.0, []), (5.1, [1])])
async def test_who_gave_up_is_forgotten_and_who_is_late_is_named(now: float, late: list[int]) -> None:
    queue = RequestQueue()
    requests = [queued(CLIENTS[0], 1, size=7, deadline=deadline) for deadline in (60.0, 5.0, 5.0)]
    for one in requests:
        queue.add(one)
    requests[2].done.cancel()
    assert queue.late(now) == [requests[index] for index in late]
    assert queue.facts(CLIENTS[0], 0.0).client_requests == 2 - len(late)
