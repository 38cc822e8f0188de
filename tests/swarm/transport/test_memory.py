"""The faults of the in-memory network, and that they end when their block does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest

from moehive.protocol.errors import PeerUnreachable
from moehive.swarm.identity import Identity
from moehive.swarm.transport.base import Record, Stream
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

PROTOCOL = "/test/1.0.0"


class World:
    """A network with a clock that stands still, a node that answers each byte with 1000 bytes, and a client."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.network = MemoryNetwork(clock=lambda: self.now, buffer_bytes=4096)
        self.node = MemoryTransport(self.network, Identity.from_seed(bytes(32)))
        self.client = MemoryTransport(self.network, Identity.from_seed(bytes([1] * 32)))

    async def open(self) -> Stream:
        return await self.client.open(self.node.peer, PROTOCOL)


async def answer(stream: Stream) -> None:
    while request := await stream.read(1):
        await stream.write(request * 1000)


async def read(stream: Stream, size: int) -> bytes:
    """`size` bytes, or fewer when the stream ends."""
    data = b""
    while len(data) < size and (piece := await stream.read(size - len(data))):
        data += piece
    return data


async def read_all(stream: Stream) -> bytes:
    return await read(stream, 1 << 30)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    async with world.node, world.client:
        await world.node.serve(PROTOCOL, answer)
        yield world


async def test_partition_holds_bytes_back_and_heals(world: World) -> None:
    stream = await world.open()
    with world.network.partitioned(world.node.peer):
        await stream.write(b"x")
        reading = asyncio.create_task(read(stream, 1000))
        await asyncio.wait({reading}, timeout=0.01)
        assert not reading.done()
        with pytest.raises(PeerUnreachable):
            await world.open()
        with pytest.raises(PeerUnreachable):
            await world.node.open(world.client.peer, PROTOCOL)
        assert not await world.node.put(b"key", "a", Record(b"", 1060.0))
    assert await reading == b"x" * 1000
    await (await world.open()).close()


async def test_dropped_connections_do_not_come_back(world: World) -> None:
    stream = await world.open()
    reading = asyncio.create_task(stream.read(1))
    await asyncio.sleep(0)
    with world.network.dropping_connections(world.node.peer):
        with pytest.raises(PeerUnreachable):
            await reading
        with pytest.raises(PeerUnreachable):
            await world.open()
    with pytest.raises(PeerUnreachable):
        await stream.write(b"x")
    await stream.close()
    stream = await world.open()
    await stream.write(b"y")
    assert await read(stream, 1000) == b"y" * 1000


async def test_stalled_peer_fills_its_buffer_and_goes_on(world: World) -> None:
    stream = await world.open()
    with world.network.stalled(world.node.peer):
        await stream.write(b"abcdefgh")  # 8000 bytes in answer, for a buffer of 4096
        reading = asyncio.create_task(read(stream, 8000))
        await asyncio.wait({reading}, timeout=0.01)
        assert not reading.done()
    assert await reading == b"".join(bytes([letter]) * 1000 for letter in b"abcdefgh")


async def test_corruption_hits_every_nth_byte_of_one_direction(world: World) -> None:
    stream = await world.open()
    with world.network.corrupting(world.node.peer, every=300):
        await stream.write(b"aa")
        received = await read(stream, 2000)
    assert [index for index, byte in enumerate(received) if byte != ord("a")] == [299, 599, 899, 1199, 1499, 1799]
    with world.network.corrupting(world.client.peer, every=1):
        await stream.write(b"a")
        assert await read(stream, 1000) == b"`" * 1000


@pytest.mark.parametrize("after", [0, 1, 999, 1000, 1500])
async def test_truncation_looks_like_an_end(world: World, after: int) -> None:
    stream = await world.open()
    with world.network.truncating(world.node.peer, after=after):
        await stream.write(b"ab")
        assert await read_all(stream) == (b"a" * 1000 + b"b" * 1000)[:after]


async def test_peer_that_leaves(world: World) -> None:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(MemoryTransport(world.network, Identity.ephemeral()))
        await node.serve(PROTOCOL, answer)
        stream = await world.client.open(node.peer, PROTOCOL)
        await stack.aclose()
        assert await read_all(stream) == b""
        with pytest.raises(PeerUnreachable):
            await stream.write(b"x")
        with pytest.raises(PeerUnreachable):
            await world.client.open(node.peer, PROTOCOL)


async def test_records_expire_by_the_given_clock(world: World) -> None:
    record = Record(b"", 1060.0)
    assert await world.node.put(b"key", "a", record)
    world.now = 1059.9
    assert await world.client.get(b"key") == {"a": record}
    world.now = 1060.0
    assert await world.client.get(b"key") == {}


async def test_reads_cut_where_nobody_wrote_and_do_so_repeatably() -> None:
    async def cuts() -> list[int]:
        world = World()
        async with world.node, world.client:
            await world.node.serve(PROTOCOL, answer)
            stream = await world.open()
            await stream.write(b"abcdefgh")
            sizes = [0]
            while sizes[-1] < 8000:
                sizes.append(sizes[-1] + len(await stream.read(1 << 20)))
            return sizes

    first = await cuts()
    assert first == await cuts()
    assert any(end % 1000 for end in first)
    assert {1, 2, 3, 4, 5, 6, 7} & {end - start for start, end in pairwise(first)}
