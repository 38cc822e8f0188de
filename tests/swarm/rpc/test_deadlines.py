"""Peers that do everything slowly, or stop in the middle: each wait has an end, and holds nothing up for the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.swarm_fakes import MODEL, SECRET, identity

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerError, PeerTimeout
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, Cancel, Chunk, ChunkHashes, GetChunkList, GetChunks
from moehive.protocol.proofs import Admission
from moehive.protocol.session import ClientSession
from moehive.swarm.rpc import client as rpc_client
from moehive.swarm.rpc import server as rpc_server
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Reply, RequestHandler, stream_handler
from moehive.swarm.transport.memory import MemoryNetwork, MemoryStream, MemoryTransport

SERVER, CLIENT = identity(1), identity(2)


class LoopClock:
    """The running loop's clock, which can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real, self.ahead = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.ahead)

    async def pass_(self, seconds: float) -> None:
        await settle()
        self.ahead += seconds
        await settle()


async def settle() -> None:
    """Let everything happen that can happen without waiting."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    return LoopClock(monkeypatch)


async def size_one(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    await reply(ChunkHashes(size=1))


async def never(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def raw_stream(handle: RequestHandler) -> AsyncIterator[MemoryStream]:
    """A stream to a server; whoever uses it speaks the protocol by hand."""
    network = MemoryNetwork()
    async with MemoryTransport(network, SERVER) as server, MemoryTransport(network, CLIENT) as client:
        await server.serve(SHARD.name, stream_handler(SHARD, SECRET, server.peer, "server", handle))
        yield await client.open(SERVER.peer, SHARD.name)


def session() -> ClientSession:
    return ClientSession(SHARD, Admission(SECRET, CLIENT.peer, SERVER.peer), "client")


async def opened(stream: MemoryStream) -> ClientSession:
    """Say hello, read the welcome."""
    ours = session()
    await stream.write(*ours.send_hello())
    while not ours.receive(await stream.read(1 << 16)):
        pass
    return ours


async def assert_ends(stream: MemoryStream) -> None:
    async with asyncio.timeout(0.8 * limits.HELLO_TIMEOUT):  # before a deadline that begins now would
        while await stream.read(1 << 16):
            pass


# --- the server ---------------------------------------------------------------------------------------------------


async def test_a_stranger_who_says_hello_byte_by_byte_gets_no_new_deadline(clock: LoopClock) -> None:
    async with raw_stream(size_one) as stream:
        hello = b"".join(session().send_hello())
        for byte in hello[:3]:
            await stream.write(bytes([byte]))
            await clock.pass_(0.4 * limits.HELLO_TIMEOUT)
        await assert_ends(stream)


async def test_a_frame_that_trickles_in_gets_no_new_deadline(clock: LoopClock) -> None:
    async with raw_stream(size_one) as stream:
        ours = await opened(stream)
        _, request = ours.send_request(GetChunkList(hash=MODEL))
        for byte in b"".join(request)[:3]:
            await stream.write(bytes([byte]))
            await clock.pass_(0.4 * rpc_server.FRAME_TIMEOUT)
        await assert_ends(stream)


async def test_a_quiet_member_may_stay(clock: LoopClock) -> None:
    async with raw_stream(size_one) as stream:
        ours = await opened(stream)
        for _ in range(3):
            await clock.pass_(10 * rpc_server.FRAME_TIMEOUT)
            await stream.write(*ours.send_request(GetChunkList(hash=MODEL))[1])
            while not ours.receive(await stream.read(1 << 16)):
                pass


async def test_who_does_not_read_what_it_asked_for_holds_nothing(clock: LoopClock) -> None:
    ended = asyncio.Event()

    async def much(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        try:
            await reply(Chunk(index=0), (bytes(1 << 20),))  # more than the network holds on its way
        finally:
            ended.set()

    async with raw_stream(much) as stream:
        ours = await opened(stream)
        await stream.write(*ours.send_request(GetChunks(hash=MODEL, first=0, count=1))[1])
        await clock.pass_(2 * rpc_server.FRAME_TIMEOUT)
        assert ended.is_set()


async def test_an_id_used_again_is_not_taken_for_the_cancelled_request() -> None:
    cancelled = 0

    async def count(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise

    async with raw_stream(count) as stream:
        ours = await opened(stream)
        request, cancel = ours._frame(1, GetChunkList(hash=MODEL)), ours._frame(1, Cancel())
        await stream.write(*request)
        await settle()
        await stream.write(b"".join((*cancel, *request)))
        await settle()
        await stream.write(*cancel)
        await settle()
        assert cancelled == 2


# --- the client ---------------------------------------------------------------------------------------------------


class Slow:
    """A stream whose writes do something first."""

    def __init__(self, stream: MemoryStream) -> None:
        self._stream = stream
        self.before_write = asyncio.Event()  # not set: writes wait
        self.after_write = lambda: None
        self.before_write.set()
        self.read, self.close, self.peer = stream.read, stream.close, stream.peer

    async def write(self, *buffers: bytes) -> None:
        await self.before_write.wait()
        await self._stream.write(*buffers)
        self.after_write()


@asynccontextmanager
async def slow_connection(handle: RequestHandler) -> AsyncIterator[tuple[Connection, Slow]]:
    async with raw_stream(handle) as stream:
        slow = Slow(stream)
        async with Connection(slow, session()) as connection:  # type: ignore[arg-type]
            yield connection, slow


async def test_the_deadline_holds_for_sending_and_answering_together(clock: LoopClock) -> None:
    async with slow_connection(never) as (connection, slow):

        def sending_takes_long() -> None:
            clock.ahead += 99.0

        slow.after_write = sending_takes_long
        async with asyncio.timeout(150):  # of the clock that is put forward: about one second
            with pytest.raises(PeerTimeout):
                await connection.ask(GetChunkList(hash=MODEL), timeout=100.0)


async def test_a_peer_that_does_not_even_take_the_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_client, "CANCEL_TIMEOUT", 0.01)
    async with slow_connection(never) as (connection, slow):
        slow.after_write = slow.before_write.clear
        async with asyncio.timeout(60):
            with pytest.raises(PeerTimeout):
                await connection.ask(GetChunkList(hash=MODEL), timeout=0.01)
        assert connection.broken is not None  # half a frame may be out


async def test_nobody_waits_longer_than_it_said_for_another_ones_attempt_to_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT", 3600.0)
    network = MemoryNetwork()
    async with (
        MemoryTransport(network, SERVER) as server,
        MemoryTransport(network, CLIENT) as transport,
        ConnectionPool(transport, SHARD, SECRET, "client") as pool,
    ):
        await server.serve(SHARD.name, stream_handler(SHARD, SECRET, server.peer, "server", size_one))
        with network.stalled(SERVER.peer):
            patient = asyncio.create_task(pool.connection(SERVER.peer, timeout=3600.0))
            await settle()
            async with asyncio.timeout(60):
                with pytest.raises(PeerTimeout):
                    await pool.connection(SERVER.peer, timeout=0.01)
            assert not patient.done()
        assert (await patient).broken is None  # the impatient one did not spoil it


async def test_a_connection_that_breaks_gives_its_stream_back_at_once() -> None:
    network = MemoryNetwork()
    async with (
        MemoryTransport(network, CLIENT) as transport,
        ConnectionPool(transport, SHARD, SECRET, "client") as pool,
    ):
        async with MemoryTransport(network, SERVER) as server:
            await server.serve(SHARD.name, stream_handler(SHARD, SECRET, server.peer, "server", size_one))
            connection = await pool.connection(SERVER.peer)
            assert transport.streams
        await settle()
        assert isinstance(connection.broken, PeerError)
        assert not transport.streams
