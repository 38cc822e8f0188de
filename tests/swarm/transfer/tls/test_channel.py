"""The client's channel against the real server: order, cancellation and deadlines. Real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
from support.bulk import (
    CHUNKS,
    PATIENCE,
    Collected,
    FakeShelf,
    Gate,
    ascending,
    channel_to,
    data_of,
    get,
    serving,
    soon,
)

from moehive.protocol import limits
from moehive.protocol.errors import PeerRefused, PeerTimeout, RefusalCode, StorageError
from moehive.protocol.ids import ShardHash
from moehive.swarm.store.base import WrongBytes
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transfer.tls.server import BulkServer


@pytest.fixture
async def channel(server: BulkServer) -> AsyncIterator[TlsChannel]:
    async with channel_to(server) as opened:
        yield opened


# --- what is asked for comes ------------------------------------------------------------------------------------------


async def test_all_of_an_object(channel: TlsChannel, shelf: FakeShelf) -> None:
    collected = await get(channel, shelf, 0, CHUNKS + 1)
    assert collected.indices == list(range(CHUNKS + 1))
    assert collected.bytes == shelf.data


async def test_many_requests_at_once(channel: TlsChannel, shelf: FakeShelf) -> None:
    each = await asyncio.gather(*(get(channel, shelf, first, 3) for first in range(0, 12, 3)))
    assert [collected.indices for collected in each] == [list(range(first, first + 3)) for first in range(0, 12, 3)]
    assert b"".join(collected.bytes for collected in each) == shelf.data[: 12 << 20]


async def test_more_requests_than_fit_wait_for_their_turn(channel: TlsChannel, shelf: FakeShelf) -> None:
    each = await asyncio.gather(*(get(channel, shelf, CHUNKS, 1) for _ in range(3 * limits.MAX_REQUESTS_IN_FLIGHT)))
    assert all(collected.bytes == shelf.data[-5:] for collected in each)


async def test_chunk_list_and_have(channel: TlsChannel, shelf: FakeShelf) -> None:
    assert await channel.chunk_list(shelf.hash, timeout=PATIENCE) == shelf.chunks
    assert await channel.have(shelf.hash, timeout=PATIENCE) is None


async def test_a_question_does_not_wait_for_the_chunks_in_front_of_it(channel: TlsChannel, shelf: FakeShelf) -> None:
    first, rest = Gate(), Gate()
    shelf.gate = lambda index: (rest if index > 3 else first)(index)
    running = [asyncio.create_task(get(channel, shelf, 0, 8)) for _ in range(2)]
    await asyncio.to_thread(first.reached.wait, PATIENCE)
    asking = asyncio.create_task(channel.chunk_list(shelf.hash, timeout=PATIENCE))
    await asyncio.sleep(0)
    first.open()
    await asking
    rest.open()
    assert [len(collected.chunks) for collected in await asyncio.gather(*running)] == [8, 8]


@pytest.mark.parametrize(("first", "count"), [(CHUNKS, 2), (CHUNKS + 1, 1)])
async def test_a_refused_request_says_why_and_the_channel_goes_on(
    channel: TlsChannel, shelf: FakeShelf, first: int, count: int
) -> None:
    with pytest.raises(PeerRefused) as refused:
        await get(channel, shelf, first, count)
    assert refused.value.code is RefusalCode.BAD_REQUEST
    with pytest.raises(PeerRefused) as refused:
        await channel.chunk_list(ShardHash("0" * 64), timeout=PATIENCE)
    assert refused.value.code is RefusalCode.NOT_HELD
    assert (await get(channel, shelf, CHUNKS, 1)).bytes == shelf.data[-5:]


async def test_a_server_whose_disk_fails_refuses_after_what_it_could_send(
    channel: TlsChannel, shelf: FakeShelf
) -> None:
    def fail(index: int) -> None:
        if index == 3:
            raise StorageError("the disk is gone")

    shelf.gate = fail
    collected = Collected()
    with pytest.raises(PeerRefused) as refused:
        await channel.get_chunks(shelf.hash, 0, 8, collected, timeout=PATIENCE)
    assert refused.value.code is RefusalCode.INTERNAL
    assert "disk" not in refused.value.detail
    assert collected.indices == [0, 1, 2]
    assert (await get(channel, shelf, 5, 2)).indices == [5, 6]


async def test_the_receiver_closes_first(server: BulkServer, channel: TlsChannel, shelf: FakeShelf) -> None:
    """A sender that hangs up after its last byte may cut that off; this one waits for the receiver to have it all."""
    await get(channel, shelf, 0, CHUNKS + 1)
    [connection] = server._connections
    assert await soon(lambda: not connection._answering)
    assert channel.broken is None
    assert not connection._ending.is_set()
    await channel.close()
    assert await soon(lambda: not server._connections)


# --- deliver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [WrongBytes("chunk 2"), StorageError("full"), ZeroDivisionError()])
async def test_what_deliver_raises_ends_its_request_only(
    channel: TlsChannel, shelf: FakeShelf, error: Exception
) -> None:
    def refuse(index: int) -> None:
        if index == 2:
            raise error

    collected = Collected(refuse)
    other = asyncio.create_task(get(channel, shelf, 3, 6))
    with pytest.raises(type(error)) as caught:
        await channel.get_chunks(shelf.hash, 0, 8, collected, timeout=PATIENCE)
    assert caught.value is error
    assert collected.indices == [0, 1]
    assert (await other).indices == list(range(3, 9))
    assert channel.broken is None


async def test_deliveries_of_one_request_never_overlap(channel: TlsChannel, shelf: FakeShelf) -> None:
    at_work, most = [0], [0]

    def count(index: int) -> None:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        threading.Event().wait(0.001)
        at_work[0] -= 1

    collected = Collected(count)
    await channel.get_chunks(shelf.hash, 0, CHUNKS, collected, timeout=PATIENCE)
    assert most == [1]
    assert ascending(collected.indices)


async def test_deliver_runs_in_a_thread_and_the_loop_goes_on(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    collected = Collected(gate)
    count = 1  # with more of them the connection waits too
    running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, count, collected, timeout=PATIENCE))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)  # the loop works
    assert await channel.chunk_list(shelf.hash, timeout=PATIENCE) == shelf.chunks  # and so does the connection
    gate.open()
    await running
    assert len(collected.chunks) == count


async def test_a_slow_receiver_holds_the_sender_back() -> None:
    """What is on its way is bounded by our buffers and the kernel's, not by what was asked for."""
    gate = Gate()
    shelf = FakeShelf(data_of(32))
    async with serving(shelf) as server, channel_to(server) as channel:
        collected = Collected(gate)
        running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, 32, collected, timeout=PATIENCE))
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        seen = -1
        while seen < 2 or seen != len(shelf.read):  # until the sender comes no further
            seen = len(shelf.read)
            await asyncio.wait((running,), timeout=0.3)
        assert seen < 24
        gate.open()
        await running
    assert collected.bytes == shelf.data[: 32 << 20]


# --- deadlines and cancellation ---------------------------------------------------------------------------------------


async def test_a_silent_server_is_given_up_after_the_timeout(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    with pytest.raises(PeerTimeout):
        await get(channel, shelf, 0, 4, timeout=0.2)
    gate.open()
    assert (await get(channel, shelf, 4, 2)).indices == [4, 5]


async def test_a_silent_server_is_given_up_between_two_chunks(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = lambda index: gate(index) if index == 2 else None
    collected = Collected()
    with pytest.raises(PeerTimeout):
        await channel.get_chunks(shelf.hash, 0, 4, collected, timeout=2.0)
    assert collected.indices == [0, 1]
    gate.open()
    assert await channel.have(shelf.hash, timeout=PATIENCE) is None
    assert collected.indices == [0, 1]  # what came later was not delivered


async def test_a_slow_disk_is_not_the_peers_fault(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    collected = Collected(gate)
    running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, 8, collected, timeout=1.0))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    await asyncio.wait((running,), timeout=1.5)
    assert not running.done()
    gate.open()
    await running
    assert len(collected.chunks) == 8


async def test_a_question_that_is_not_answered_in_time(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    running = asyncio.create_task(get(channel, shelf, 0, 4))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    with pytest.raises(PeerTimeout):
        await channel.chunk_list(shelf.hash, timeout=0.1)
    gate.open()
    await running
    assert await channel.chunk_list(shelf.hash, timeout=PATIENCE) == shelf.chunks


async def test_no_place_for_a_request_is_a_timeout_too(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    running = [asyncio.create_task(get(channel, shelf, 0, 1)) for _ in range(limits.MAX_REQUESTS_IN_FLIGHT)]
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    with pytest.raises(PeerTimeout, match="unanswered"):
        await get(channel, shelf, 0, 1, timeout=0.1)
    gate.open()
    await asyncio.gather(*running)


async def test_after_a_cancellation_nothing_is_delivered_and_the_server_stops(
    channel: TlsChannel, shelf: FakeShelf
) -> None:
    gate = Gate()
    collected = Collected(gate)
    running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, CHUNKS, collected, timeout=PATIENCE))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()  # a delivery is going on
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await running
    delivered = collected.indices
    assert len(delivered) == 1
    assert await channel.have(shelf.hash, timeout=PATIENCE) is None  # everything before it has passed
    assert collected.indices == delivered
    assert (await get(channel, shelf, CHUNKS, 1)).bytes == shelf.data[-5:]


async def test_a_withdrawn_request_is_not_read_to_its_end(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = lambda index: gate(index) if index == 1 else None
    running = asyncio.create_task(get(channel, shelf, 0, CHUNKS))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    gate.open()
    assert (await get(channel, shelf, CHUNKS, 1)).bytes == shelf.data[-5:]  # it has waited behind the withdrawn one
    assert len(shelf.read) <= 5  # the one being sent, the one that was read ahead, and the last


async def test_a_request_that_waits_behind_others_can_be_withdrawn(channel: TlsChannel, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    first = asyncio.create_task(get(channel, shelf, 0, 2))
    await asyncio.to_thread(gate.reached.wait, PATIENCE)
    second = asyncio.create_task(get(channel, shelf, 5, 5))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gate.open()
    assert (await first).indices == [0, 1]
    assert await channel.have(shelf.hash, timeout=PATIENCE) is None
    assert shelf.read == [0, 1]
