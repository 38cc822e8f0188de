"""Requests over streams: a real client and server session on the in-memory network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.swarm_fakes import MODEL, SECRET, identity

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import (
    LocalError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolViolation,
    RefusalCode,
)
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, Chunk, ChunkHashes, GetChunkList, GetChunks
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import FIRST_BACKOFF, ConnectionPool
from moehive.swarm.rpc.server import Gate, Refusal, Reply, RequestHandler, open_gate, stream_handler
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SERVER, CLIENT = identity(1), identity(2)


class Clock:
    """A clock that stands still until it is told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def serving(
    network: MemoryNetwork,
    handle: RequestHandler,
    *,
    clock: Clock | None = None,
    secret: bytes = SECRET,
    gate: Gate = open_gate,
) -> AsyncIterator[ConnectionPool]:
    """A server that answers with `handle`, and a client's pool."""
    async with MemoryTransport(network, SERVER) as server, MemoryTransport(network, CLIENT) as client:
        await server.serve(SHARD.name, stream_handler(SHARD, SECRET, server.peer, "server", handle, gate=gate))
        async with ConnectionPool(client, SHARD, secret, "client", clock=clock or Clock()) as pool:
            yield pool


async def connection_of(pool: ConnectionPool) -> Connection:
    return await pool.connection(SERVER.peer)


async def size_of_hash(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Answers GetChunkList with no hashes, GetChunks with chunks that hold their index."""
    if isinstance(message, GetChunkList):
        await reply(ChunkHashes(size=int(message.hash[:4], 16)))
    else:
        assert isinstance(message, GetChunks)
        for index in range(message.first, message.first + message.count):
            await reply(Chunk(index=index), (bytes([index]) * 3,), more=index + 1 < message.first + message.count)


async def test_many_requests_share_one_connection() -> None:
    async with serving(MemoryNetwork(), size_of_hash) as pool:
        connection = await connection_of(pool)
        asked = [GetChunkList(hash=f"{size:04x}" + "0" * 60) for size in range(200)]
        answers = await asyncio.gather(*(connection.ask(message, timeout=60) for message in asked))
        assert [answer.message.size for answer in answers] == list(range(200))  # type: ignore[attr-defined]
        assert await connection_of(pool) is connection
        assert connection.agent == "server"


async def test_answers_in_parts() -> None:
    async with serving(MemoryNetwork(), size_of_hash) as pool:
        connection = await connection_of(pool)
        parts = [part async for part in connection.ask_many(GetChunks(hash=MODEL, first=2, count=3), timeout=60)]
        assert [bytes(part.payload) for part in parts] == [b"\2\2\2", b"\3\3\3", b"\4\4\4"]
        assert [part.more for part in parts] == [True, True, False]
        assert connection.in_flight == 0


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (Refusal(RefusalCode.NOT_HELD, "no such"), RefusalCode.NOT_HELD),
        (ProtocolViolation("odd numbers"), RefusalCode.BAD_REQUEST),
        (LocalError("my disk"), RefusalCode.INTERNAL),
        (ZeroDivisionError("a bug"), RefusalCode.INTERNAL),
    ],
)
async def test_refusals_name_the_reason_and_the_connection_goes_on(raised: Exception, code: RefusalCode) -> None:
    async def refuse_first(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if isinstance(message, GetChunks):
            raise raised
        await size_of_hash(peer, message, payload, reply)

    async with serving(MemoryNetwork(), refuse_first) as pool:
        connection = await connection_of(pool)
        with pytest.raises(PeerRefused) as refused:
            await connection.ask(GetChunks(hash=MODEL, first=0, count=1), timeout=60)
        assert refused.value.code is code
        assert refused.value.peer == SERVER.peer
        assert "my disk" not in str(refused.value)  # our own troubles are not told to strangers
        assert (await connection.ask(GetChunkList(hash=MODEL), timeout=60)).message == ChunkHashes(size=0xABAB)


async def test_a_late_answer_times_out_and_the_request_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def never(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(MemoryNetwork(), never) as pool:
        connection = await connection_of(pool)
        with pytest.raises(PeerTimeout):
            await connection.ask(GetChunkList(hash=MODEL), timeout=0.01)
        async with asyncio.timeout(60):
            await cancelled.wait()
        assert connection.broken is None


async def test_another_swarm_is_refused_and_tried_again_only_after_a_pause() -> None:
    clock = Clock()
    async with serving(MemoryNetwork(), size_of_hash, clock=clock, secret=b"x" * 32) as pool:
        with pytest.raises(PeerRefused) as refused:
            await connection_of(pool)
        assert refused.value.code is RefusalCode.NOT_ADMITTED
        with pytest.raises(PeerUnreachable, match="not dialled again yet"):
            await connection_of(pool)
        clock.now += 2 * FIRST_BACKOFF
        with pytest.raises(PeerRefused):
            await connection_of(pool)


async def test_a_broken_connection_fails_waiting_requests_and_is_replaced() -> None:
    network, waiting = MemoryNetwork(), asyncio.Event()

    async def first_hangs(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if not waiting.is_set():
            waiting.set()
            await asyncio.Event().wait()
        await size_of_hash(peer, message, payload, reply)

    async with serving(network, first_hangs) as pool:
        first = await connection_of(pool)
        asking = asyncio.create_task(first.ask(GetChunkList(hash=MODEL), timeout=60))
        await waiting.wait()
        with network.dropping_connections(SERVER.peer), pytest.raises(PeerUnreachable):
            await asking
        second = await connection_of(pool)
        assert second is not first
        assert (await second.ask(GetChunkList(hash=MODEL), timeout=60)).message == ChunkHashes(size=0xABAB)


@pytest.mark.parametrize("every", [5, 61, 333])
async def test_corrupted_frames_end_in_errors_of_ours(every: int) -> None:
    network = MemoryNetwork()
    async with serving(network, size_of_hash) as pool:
        connection = await connection_of(pool)
        with network.corrupting(SERVER.peer, every=every):
            for _ in range(20):
                try:
                    await connection.ask(GetChunkList(hash=MODEL), timeout=0.2)
                except (ProtocolViolation, PeerUnreachable, PeerTimeout, PeerRefused):
                    break
            else:
                pytest.fail("twenty corrupted answers went unnoticed")


async def test_a_stream_that_ends_inside_an_answer_is_not_taken_for_complete() -> None:
    network = MemoryNetwork()
    async with serving(network, size_of_hash) as pool:
        connection = await connection_of(pool)
        with network.truncating(SERVER.peer, after=200), pytest.raises((ProtocolViolation, PeerUnreachable)):
            async for _ in connection.ask_many(GetChunks(hash=MODEL, first=0, count=32), timeout=5):
                pass


async def test_more_requests_than_allowed_wait_for_their_turn() -> None:
    running, most, go_on = 0, 0, asyncio.Event()

    async def count(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == limits.MAX_REQUESTS_IN_FLIGHT:
            go_on.set()
        await go_on.wait()
        running -= 1
        await reply(ChunkHashes(size=1))

    async with serving(MemoryNetwork(), count) as pool:
        connection = await connection_of(pool)
        count_asked = limits.MAX_REQUESTS_IN_FLIGHT + 20
        asked = (connection.ask(GetChunkList(hash=MODEL), timeout=60) for _ in range(count_asked))
        assert len(await asyncio.gather(*asked)) == count_asked
        assert most == limits.MAX_REQUESTS_IN_FLIGHT


async def test_a_peer_that_confirms_nothing_makes_nobody_wait_for_ever() -> None:
    network = MemoryNetwork()
    async with serving(network, size_of_hash) as pool:
        connection = await connection_of(pool)
        message = GetChunkList(hash=MODEL)
        with network.stalled(SERVER.peer):
            asked = [connection.ask(message, timeout=0.02) for _ in range(limits.MAX_REQUESTS_IN_FLIGHT + 1)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(answer) for answer in answers} == {PeerTimeout}
            with pytest.raises(PeerTimeout, match="64 requests are unanswered"):
                await connection.ask(message, timeout=0.02)
        assert (await connection.ask(message, timeout=60)).message == ChunkHashes(size=0xABAB)


async def test_what_the_gate_turns_away_is_refused_without_its_handler() -> None:
    begun: list[int] = []

    async def handle(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        assert isinstance(message, GetChunkList)
        begun.append(int(message.hash[:4], 16))
        await size_of_hash(peer, message, payload, reply)

    def gate(peer: PeerId, message: Message, payload_bytes: int) -> Refusal | None:
        assert (peer, payload_bytes) == (CLIENT.peer, 0)
        assert isinstance(message, GetChunkList)
        odd = int(message.hash[:4], 16) % 2
        return Refusal(RefusalCode.BUSY, "odd", retry_after=1.5) if odd else None

    async with serving(MemoryNetwork(), handle, gate=gate) as pool:
        connection = await connection_of(pool)
        asked = [GetChunkList(hash=f"{size:04x}" + "0" * 60) for size in range(20)]
        outcomes = await asyncio.gather(
            *(connection.ask(message, timeout=60) for message in asked), return_exceptions=True
        )
    refused = [outcome for outcome in outcomes if isinstance(outcome, PeerRefused)]
    assert sorted(begun) == list(range(0, 20, 2))
    assert {outcomes.index(outcome) for outcome in refused} == set(range(1, 20, 2))
    assert {(one.code, one.retry_after) for one in refused} == {(RefusalCode.BUSY, 1.5)}
