"""What every transport promises (swarm/transport/base.py), held by all of them."""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.limits import MAX_STREAMS_PER_PEER
from moehive.swarm.identity import Identity
from moehive.swarm.transport.base import Record, Stream

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(30)]


async def read_exactly(stream: Stream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.read(size - len(data))
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


async def read_to_end(stream: Stream) -> bytes:
    """Until the other side has gone, which a carrier may report as an end or as an error."""
    data = bytearray()
    try:
        while piece := await stream.read(1 << 20):
            data += piece
    except PeerUnreachable:
        pass
    return bytes(data)


async def echo(stream: Stream) -> None:
    while piece := await stream.read(1 << 20):
        await stream.write(piece)


async def test_echo_of_5_mib(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)
    data = random.Random(0).randbytes(5 << 20)
    stream = await pair.client.open(pair.node.peer, pair.name, pair.node.addresses)
    writing = asyncio.create_task(stream.write(b"header", memoryview(data), bytearray(b"trailer")))
    assert await read_exactly(stream, len(data) + 13) == b"header" + data + b"trailer"
    await writing
    await stream.close()


async def test_peers_are_authenticated_on_both_sides(pair: Any) -> None:
    seen = asyncio.get_running_loop().create_future()

    async def handler(stream: Stream) -> None:
        seen.set_result(stream.peer)

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    assert stream.peer == pair.node.peer
    assert await seen == pair.client.peer
    await stream.close()


async def test_streams_do_not_mix(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)

    async def converse(number: int) -> None:
        stream = await pair.client.open(pair.node.peer, pair.name)
        data = bytes([number]) * 100_000
        await stream.write(data)
        assert await read_exactly(stream, len(data)) == data
        await stream.close()

    await asyncio.gather(*(converse(number) for number in range(10)))


async def test_writes_of_several_tasks_stay_whole(pair: Any) -> None:
    size = 300_000

    async def handler(stream: Stream) -> None:
        for _ in range(4):
            block = await read_exactly(stream, size)
            assert len(set(block)) == 1
        await stream.write(b"ok")
        await stream.read(1)

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    await asyncio.gather(*(stream.write(bytes([number]) * size) for number in range(4)))
    assert await read_exactly(stream, 2) == b"ok"
    await stream.close()


async def test_writer_waits_for_reader(pair: Any) -> None:
    reading = asyncio.Event()
    size = 32 << 20

    async def handler(stream: Stream) -> None:
        await reading.wait()
        await read_exactly(stream, size)
        await stream.write(b"ok")
        await stream.read(1)

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    writing = asyncio.create_task(stream.write(bytes(size)))
    await asyncio.wait({writing}, timeout=0.2)
    assert not writing.done()
    reading.set()
    await writing
    assert await read_exactly(stream, 2) == b"ok"
    await stream.close()


async def test_stream_ends_when_handler_returns(pair: Any) -> None:
    async def handler(stream: Stream) -> None:
        await stream.write(b"bye")

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    assert await read_to_end(stream) == b"bye"
    await stream.close()


async def test_handler_sees_the_client_close(pair: Any) -> None:
    ended = asyncio.Event()

    async def handler(stream: Stream) -> None:
        assert await read_to_end(stream) == b"hello"
        ended.set()

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    await stream.write(b"hello")
    await stream.close()
    await ended.wait()


async def test_closed_stream_refuses_everything_but_closing(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)
    stream = await pair.client.open(pair.node.peer, pair.name)
    waiting = asyncio.create_task(stream.read(10))
    await asyncio.sleep(0)
    await stream.close()
    await stream.close()
    with pytest.raises(PeerUnreachable):
        await waiting
    with pytest.raises(PeerUnreachable):
        await stream.read(10)
    with pytest.raises(PeerUnreachable):
        await stream.write(b"x")


async def test_writing_to_a_peer_that_closed_fails(pair: Any) -> None:
    async def handler(stream: Stream) -> None:
        await stream.read(1)

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)

    async def write_until_it_fails() -> None:
        while True:
            await stream.write(bytes(100_000))

    with pytest.raises(PeerUnreachable):
        await asyncio.wait_for(write_until_it_fails(), 60)
    await stream.close()


async def test_close_does_not_wait_for_a_reader_that_hangs(pair: Any) -> None:
    release = asyncio.Event()

    async def handler(_: Stream) -> None:
        await release.wait()

    await pair.node.serve(pair.name, handler)
    stream = await pair.client.open(pair.node.peer, pair.name)
    writing = asyncio.create_task(stream.write(bytes(32 << 20)))
    await asyncio.wait({writing}, timeout=0.1)
    await asyncio.wait_for(stream.close(), 60)  # the reader would hang for ever
    release.set()
    with pytest.raises(PeerUnreachable):
        await writing


async def test_protocol_that_nobody_serves(pair: Any) -> None:
    with pytest.raises(PeerUnreachable):
        await pair.client.open(pair.node.peer, pair.name)


async def test_peer_that_nobody_knows(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)
    stranger = Identity.ephemeral().peer
    with pytest.raises(PeerUnreachable):
        await pair.client.open(stranger, pair.name)
    with pytest.raises(PeerUnreachable):  # an address of somebody else does not help
        await pair.client.open(stranger, pair.name, [pair.node.addresses[0].replace(pair.node.peer, stranger)])


async def test_stop_serving_keeps_running_streams(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)
    stream = await pair.client.open(pair.node.peer, pair.name)
    await stream.write(b"before")
    assert await read_exactly(stream, 6) == b"before"
    await pair.node.stop_serving(pair.name)
    await stream.write(b"after")
    assert await read_exactly(stream, 5) == b"after"
    with pytest.raises(PeerUnreachable):
        await pair.client.open(pair.node.peer, pair.name)
    await stream.close()
    await pair.node.serve(pair.name, echo)
    await (await pair.client.open(pair.node.peer, pair.name)).close()


async def test_failing_handler_is_logged_and_harms_nobody(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: Stream) -> None:
        if await stream.read(1) == b"x":
            raise ZeroDivisionError("a bug in the handler")
        await stream.write(b"fine")

    await pair.node.serve(pair.name, handler)
    for request, answer in ((b"x", b""), (b"y", b"fine")):
        stream = await pair.client.open(pair.node.peer, pair.name)
        await stream.write(request)
        assert await read_to_end(stream) == answer
        await stream.close()
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info and record.exc_info[0] for record in errors] == [ZeroDivisionError]


async def test_streams_of_one_peer_are_limited(pair: Any) -> None:
    await pair.node.serve(pair.name, echo)
    streams = []
    for _ in range(MAX_STREAMS_PER_PEER):
        stream = await pair.client.open(pair.node.peer, pair.name)
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        streams.append(stream)
    excess = await pair.client.open(pair.node.peer, pair.name)
    assert await read_to_end(excess) == b""
    await excess.close()
    await streams[0].close()

    async def open_again() -> None:  # the node notices the end a moment later
        while True:
            stream = await pair.client.open(pair.node.peer, pair.name)
            try:
                await stream.write(b"x")
                if await stream.read(1) == b"x":
                    return
            except PeerUnreachable:
                pass
            finally:
                await stream.close()

    await asyncio.wait_for(open_again(), 60)
    await asyncio.gather(*(stream.close() for stream in streams))


# ---- the table ------------------------------------------------------------------------------------------------------


async def eventually(get: Callable[[], Any], expected: object) -> None:
    """Wait until `await get()` is `expected`."""
    async with asyncio.timeout(60):
        while await get() != expected:  # noqa: ASYNC110  a table tells nobody when a record expires
            await asyncio.sleep(0.02)


async def test_records_are_found_by_everybody(pair: Any) -> None:
    key, expires = pair.name.encode(), time.time() + 60
    assert await pair.client.get(key) == {}
    ours, theirs = Record(b"from the client", expires), Record(b"from the node", expires + 1)
    assert await pair.client.put(key, "a", ours)
    assert await pair.node.put(key, "b", theirs)
    assert await pair.client.get(key) == await pair.node.get(key) == {"a": ours, "b": theirs}


async def test_only_a_later_expiry_replaces(pair: Any) -> None:
    key, expires = pair.name.encode(), time.time() + 60
    assert await pair.client.put(key, "a", Record(b"1", expires))
    assert not await pair.client.put(key, "a", Record(b"older", expires - 1))
    assert not await pair.client.put(key, "a", Record(b"same", expires))
    assert await pair.client.get(key) == {"a": Record(b"1", expires)}
    assert await pair.client.put(key, "a", Record(b"2", expires + 1))
    assert await pair.client.get(key) == {"a": Record(b"2", expires + 1)}


async def test_records_expire(pair: Any) -> None:
    key = pair.name.encode()
    lasting = Record(b"lasting", time.time() + 60)
    assert await pair.client.put(key, "b", lasting)
    # On a busy machine it may be over before it is stored.
    await eventually(lambda: pair.client.put(key, "a", Record(b"brief", time.time() + 2)), True)
    await eventually(lambda: pair.client.get(key), {"b": lasting})
    assert not await pair.client.put(key, "c", Record(b"late", time.time() - 1))


async def test_bad_records_are_not_stored(pair: Any) -> None:
    key = pair.name.encode()
    assert not await pair.client.put(key, "a", Record(b"forged", time.time() + 60))
    assert not await pair.client.put(key, "a", Record(b"for ever", time.time() + 100_000))
    assert await pair.client.get(key) == {}
