"""Small writes of one turn of the event loop leave together, in order and whole."""

from __future__ import annotations

import asyncio
import socket
import struct
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.references import without_collector

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.swarm.transport import socket_stream
from moehive.swarm.transport.socket_stream import SocketStream


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[SocketStream, list[int], socket.socket]]:
    """A stream, the sizes of what it has handed to its transport, and the other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    handed: list[int] = []
    write = writer.write

    def watched(data: bytes) -> None:
        handed.append(len(data))
        write(data)

    writer.write = watched  # type: ignore[method-assign]
    stream = SocketStream(PeerId("them"), reader, writer)
    try:
        yield stream, handed, theirs
    finally:
        await stream.close()
        theirs.close()


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    async with asyncio.timeout(60):
        while len(data) < size:
            data += await asyncio.get_running_loop().sock_recv(sock, size - len(data))
    return data


async def test_writes_of_many_tasks_leave_together_but_for_the_first() -> None:
    async with connected() as (stream, handed, theirs):
        await asyncio.gather(*(stream.write(bytes([number]), b"ab") for number in range(20)))
        expected = b"".join(bytes([number]) + b"ab" for number in range(20))
        assert await read_exactly(theirs, len(expected)) == expected
        assert handed == [3, 57]
        await stream.write(b"alone")
        assert await read_exactly(theirs, 5) == b"alone"
        assert handed == [3, 57, 5]


async def test_a_large_write_goes_behind_the_small_ones_before_it() -> None:
    async with connected() as (stream, _, theirs):
        parts = [b"a", b"b", b"c" * (100 << 10), b"d"]
        writing = asyncio.gather(*(stream.write(part) for part in parts))
        expected = b"".join(parts)
        assert await read_exactly(theirs, len(expected)) == expected
        await writing


async def test_a_header_leaves_with_the_beginning_of_its_large_body() -> None:
    async with connected() as (stream, handed, theirs):
        parts = (b"head", b"b" * (200 << 10), b"", b"c" * 10)
        writing = asyncio.ensure_future(stream.write(*parts))
        assert await read_exactly(theirs, sum(map(len, parts))) == b"".join(parts)
        await writing
        assert handed == [64 << 10, (136 << 10) + 4, 10]


async def test_many_small_writes_do_not_pile_up_before_they_are_sent() -> None:
    async with connected() as (stream, handed, theirs):
        part = b"x" * (60 << 10)
        writing = asyncio.gather(*(stream.write(part) for _ in range(30)))
        await read_exactly(theirs, 30 * len(part))
        await writing
        assert max(handed) <= (64 << 10) + len(part)  # whoever reads can begin with it


async def test_what_was_written_is_sent_before_the_stream_closes() -> None:
    async with connected() as (stream, _, theirs):
        await asyncio.gather(stream.write(b"a"), stream.write(b"b"), stream.write(b"c"), stream.close())
        assert await read_exactly(theirs, 3) == b"abc"
        with pytest.raises(PeerUnreachable):
            await stream.write(b"late")


async def test_what_the_system_did_not_take_yet_is_sent_before_the_stream_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio ends such a transport by itself once the rest has left; what aborts it after that fails."""
    monkeypatch.setattr(socket_stream, "_CLOSE_TIMEOUT", 30.0)
    async with connected() as (stream, handed, theirs):
        while not stream._writer.transport.get_write_buffer_size():  # type: ignore[attr-defined]
            await stream.write(bytes(1 << 14))
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0)
        assert not closing.done()
        await read_exactly(theirs, sum(handed))
        await closing


async def test_a_stream_that_was_reset_is_freed_at_once() -> None:
    async def reset() -> weakref.ref[SocketStream]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            theirs, _ = listener.accept()
        stream = SocketStream(PeerId("them"), reader, writer)
        reading = asyncio.create_task(stream.read(1))
        writing = asyncio.create_task(stream.write(bytes(64 << 20)))  # waits for room
        await asyncio.sleep(0)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        theirs.close()
        results = await asyncio.gather(reading, writing, return_exceptions=True)
        assert [type(result) for result in results] == [PeerUnreachable] * 2
        await stream.close()
        return weakref.ref(stream)

    with without_collector():
        gone = await reset()
        await asyncio.sleep(0)
        assert gone() is None
