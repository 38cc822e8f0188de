"""Objects from peers: verified, resumed at the next source, and whoever sends wrong bytes is blamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.swarm_fakes import SECRET, identity

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range
from moehive.protocol.codec import Message
from moehive.protocol.errors import DiskFull, RefusalCode, ShardUnavailable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, Chunk, ChunkHashes, GetChunkList, GetChunks
from moehive.swarm.fetch import CHUNKS_PER_REQUEST, Fetcher
from moehive.swarm.identity import Identity
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Refusal, Reply, stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

# More than one request; the last chunk is short.
DATA = b"".join(bytes([number]) * CHUNK_SIZE for number in range(1, CHUNKS_PER_REQUEST + 2)) + b"tail"
CHUNKS = ChunkList.of(DATA)
LAST = len(CHUNKS.hashes) - 1
A, B = identity(1), identity(2)


@dataclass
class Source:
    """A peer that has DATA, and what is wrong with it."""

    wrong_chunk: int | None = None
    wrong_list: bool = False
    out_of_order: bool = False
    hangs_up_after: int | None = None  # chunks
    refuses: RefusalCode | None = None
    sent: list[int] = field(default_factory=list)

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if self.refuses is not None:
            raise Refusal(self.refuses)
        if isinstance(message, GetChunkList):
            hashes = CHUNKS.to_bytes()
            await reply(ChunkHashes(size=len(DATA)), (hashes[::-1] if self.wrong_list else hashes,))
            return
        assert isinstance(message, GetChunks)
        for index in range(message.first, message.first + message.count):
            if self.hangs_up_after is not None and len(self.sent) >= self.hangs_up_after:
                raise Refusal(RefusalCode.INTERNAL)
            self.sent.append(index)
            offset, length = chunk_range(index, len(DATA))
            data = bytes(length) if index == self.wrong_chunk else DATA[offset : offset + length]
            named = index + 1 if self.out_of_order else index
            await reply(Chunk(index=named), (data,), more=index + 1 < message.first + message.count)


class World:
    """A store, and peers to fill it from."""

    def __init__(self, network: MemoryNetwork, pool: ConnectionPool, root: Path) -> None:
        self.network = network
        self.pool = pool
        self.standings = Standings(lambda: 20 * time.monotonic())  # pauses pass twenty times as fast
        self.store = ContentStore(root, 64 << 20)
        self.fetcher = Fetcher(pool, self.standings, self.store)
        self.received: list[int] = []
        self._sources: dict[PeerId, Sequence[str]] = {}

    @asynccontextmanager
    async def source(self, key: Identity, source: Source) -> AsyncIterator[Source]:
        async with MemoryTransport(self.network, key) as transport:
            await transport.serve(SHARD.name, stream_handler(SHARD, SECRET, transport.peer, "peer", source))
            self._sources[transport.peer] = ()
            yield source
            del self._sources[transport.peer]

    async def sources(self) -> Mapping[PeerId, Sequence[str]]:
        return dict(self._sources)

    async def fetch(self, timeout: float = 10.0) -> bytes:
        path = await self.fetcher.fetch(
            CHUNKS.root, self.sources, name="a shard", progress=self.received.append, timeout=timeout
        )
        return path.read_bytes()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    network = MemoryNetwork()
    async with (
        MemoryTransport(network, identity(9)) as client,
        ConnectionPool(client, SHARD, SECRET, "client", clock=lambda: 100 * time.monotonic()) as pool,
    ):
        yield World(network, pool, tmp_path)


async def test_all_of_it_once_and_then_never_again(world: World) -> None:
    async with world.source(A, Source()) as source:
        assert await world.fetch() == DATA
        assert sorted(source.sent) == list(range(LAST + 1))
        assert sum(world.received) == len(DATA)
    assert await world.fetch() == DATA  # nobody is there to ask
    assert not world.store.partials()


LIES: dict[str, dict[str, int]] = {
    "a wrong chunk": {"wrong_chunk": 3},
    "a wrong last chunk": {"wrong_chunk": LAST},
    "a wrong list": {"wrong_list": True},
    "out of order": {"out_of_order": True},
}


@pytest.mark.parametrize("lie", LIES)
async def test_who_sends_wrong_bytes_is_banned_and_another_one_asked(world: World, lie: str) -> None:
    async with world.source(A, Source(**LIES[lie])), world.source(B, Source()):
        assert await world.fetch() == DATA
    assert world.standings.banned(A.peer)
    assert not world.standings.banned(B.peer)
    assert world.store.objects() == {CHUNKS.root: len(DATA)}
    world.store.verify(CHUNKS.root)


@pytest.mark.parametrize("lie", LIES)
async def test_wrong_bytes_never_become_an_object(world: World, lie: str) -> None:
    async with world.source(A, Source(**LIES[lie])):
        with pytest.raises(ShardUnavailable, match="a shard"):
            await world.fetch(timeout=0.05)
    assert not world.store.has(CHUNKS.root)
    assert not world.store.objects()


async def test_the_next_source_goes_on_where_the_last_one_stopped(world: World) -> None:
    async with world.source(A, Source(hangs_up_after=4)) as first, world.source(B, Source()) as second:
        assert await world.fetch() == DATA
        assert len(first.sent) + len(second.sent) <= len(CHUNKS.hashes) + 3  # what was under way is lost
        assert len(first.sent) == 4
    assert not world.standings.banned(A.peer)


async def test_a_new_fetch_goes_on_where_an_abandoned_one_stopped(world: World) -> None:
    async with world.source(A, Source(hangs_up_after=4)):
        with pytest.raises(ShardUnavailable):
            await world.fetch(timeout=0.0)
    kept = len(world.received)
    assert kept > 0
    async with world.source(B, Source()) as second:
        assert await world.fetch() == DATA
        assert len(second.sent) <= len(CHUNKS.hashes) - kept  # fewer where a chunk was written while the fetch ended


@pytest.mark.parametrize("code", [RefusalCode.NOT_HELD, RefusalCode.BUSY, RefusalCode.INTERNAL])
async def test_a_refusal_sends_us_on(world: World, code: RefusalCode) -> None:
    async with world.source(A, Source(refuses=code)), world.source(B, Source()):
        assert await world.fetch() == DATA


async def test_a_source_that_appears_while_we_wait(world: World) -> None:
    fetching = asyncio.create_task(world.fetch())
    await asyncio.sleep(0)
    async with world.source(A, Source()):
        assert await fetching == DATA


async def test_a_busy_source_is_asked_again(world: World) -> None:
    async with world.source(A, Source(refuses=RefusalCode.BUSY)) as source:
        fetching = asyncio.create_task(world.fetch())
        await asyncio.sleep(0)
        source.refuses = None
        assert await fetching == DATA


async def test_nobody_has_it(world: World) -> None:
    with pytest.raises(ShardUnavailable, match="0 peers known"):
        await world.fetch(timeout=0.0)


async def test_the_reason_of_each_source_is_told(world: World) -> None:
    async with world.source(A, Source(refuses=RefusalCode.NOT_HELD)):
        with pytest.raises(ShardUnavailable, match=f"{A.peer}.*not_held"):
            await world.fetch(timeout=0.0)


async def test_a_full_disk_is_nobodys_fault(world: World, tmp_path: Path) -> None:
    world.store = ContentStore(tmp_path / "small", len(DATA) - 1)
    world.fetcher = Fetcher(world.pool, world.standings, world.store)
    async with world.source(A, Source()):
        with pytest.raises(DiskFull):
            await world.fetch()
    assert world.standings.usable([A.peer]) == [A.peer]


async def test_two_fetches_of_one_object_download_it_once(world: World) -> None:
    async with world.source(A, Source()) as source:
        assert await asyncio.gather(world.fetch(), world.fetch()) == [DATA, DATA]
        assert len(source.sent) == len(CHUNKS.hashes)
