"""Peers on the in-memory network that have one object, and what can be wrong with them; and a world to fetch it in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moehive.protocol.bits import Bits, from_indices, to_bitmap
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range
from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, Chunk, ChunkHashes, GetChunkList, GetChunks, GetHave, Have, OpenBulk
from moehive.swarm.identity import Identity
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Refusal, Reply, stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.downloader import Downloader
from moehive.swarm.transfer.sources import Source, Sources, Wanted
from moehive.swarm.transfer.stream_channel import stream_channels
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

from .swarm_fakes import SECRET, identity


@dataclass
class FakeSource:
    """A peer that has an object, and what is wrong with it."""

    data: bytes
    have: frozenset[int] | None = None  # chunks; None: all
    claims: frozenset[int] | None = None  # what it says that it has; None: what it has
    wrong_chunk: int | None = None
    wrong_list: bool = False
    out_of_order: bool = False
    fails_after: int | None = None  # chunks
    silent_after: int | None = None  # chunks: then it accepts requests and answers nothing
    refuses: RefusalCode | None = None
    sent: list[int] = field(default_factory=list)
    lists_sent: int = 0

    def __post_init__(self) -> None:
        self.chunks = ChunkList.of(self.data)

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if self.refuses is not None:
            raise Refusal(self.refuses)
        if isinstance(message, OpenBulk):
            raise Refusal(RefusalCode.BUSY)
        if message.hash != self.chunks.root:  # type: ignore[attr-defined]
            raise Refusal(RefusalCode.NOT_HELD)
        match message:
            case GetChunkList():
                await self._silence()
                self.lists_sent += 1
                hashes = self.chunks.to_bytes()
                await reply(ChunkHashes(size=self.chunks.size), (hashes[::-1] if self.wrong_list else hashes,))
            case GetHave():
                said = self.have if self.claims is None else self.claims
                bitmap = b"" if said is None else to_bitmap(from_indices(said), len(self.chunks.hashes))
                await reply(Have(size=self.chunks.size, complete=said is None), (bitmap,))
            case GetChunks(first=first, count=count):
                for index in range(first, first + count):
                    await self._send(index, reply, more=index + 1 < first + count)
            case _:
                raise AssertionError(message)

    async def _send(self, index: int, reply: Reply, *, more: bool) -> None:
        await self._silence()
        if self.fails_after is not None and len(self.sent) >= self.fails_after:
            raise Refusal(RefusalCode.INTERNAL)
        if self.have is not None and index not in self.have:
            raise Refusal(RefusalCode.NOT_HELD)
        self.sent.append(index)
        offset, length = chunk_range(index, len(self.data))
        data = bytes(length) if index == self.wrong_chunk else self.data[offset : offset + length]
        await reply(Chunk(index=index + self.out_of_order), (data,), more=more)

    async def _silence(self) -> None:
        if self.silent_after is not None and len(self.sent) >= self.silent_after:
            await asyncio.Event().wait()


class World:
    """A downloader with a store, and peers to fetch from. `speed` makes pauses and timeouts pass more quickly."""

    def __init__(self, network: MemoryNetwork, pool: ConnectionPool, root: Path, speed: float) -> None:
        def clock() -> float:
            return speed * time.monotonic()

        self.network = network
        self.standings = Standings(clock)
        self.store = ContentStore(root, 256 << 20)
        self.downloads = Downloader(stream_channels(pool), self.standings, clock=clock)
        self._speed = speed
        self.sources: dict[PeerId, Source] = {}

    @asynccontextmanager
    async def source(self, key: Identity, source: FakeSource, *, partial: bool = False) -> AsyncIterator[FakeSource]:
        """A peer that can be found meanwhile."""
        async with MemoryTransport(self.network, key) as transport:
            await transport.serve(SHARD.name, stream_handler(SHARD, SECRET, transport.peer, "peer", source))
            self.sources[transport.peer] = Source(partial=partial)
            yield source
            self.sources.pop(transport.peer, None)

    async def find(self) -> Sources:
        """Everybody who is there."""
        return dict(self.sources)

    def wanted(self, data: bytes, name: str = "a shard") -> Wanted:
        """An object that everybody may have."""
        return Wanted(ChunkList.of(data).root, self.find, name, len(data))

    async def fetch(self, data: bytes, timeout: float = 10.0) -> bytes:
        """Its bytes, from the store."""
        return (await self.downloads.fetch(self.wanted(data), self.store, timeout=self._speed * timeout)).read_bytes()


@dataclass
class OwnShelf:
    """What a downloader has, complete or in parts."""

    world: World

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        held = self.world.store.has(object_hash)
        return (
            self.world.store.chunk_list(object_hash) if held else self.world.downloads.partials.chunk_list(object_hash)
        )

    def have(self, object_hash: ShardHash) -> Bits:
        return EVERYTHING if self.world.store.has(object_hash) else self.world.downloads.partials.have(object_hash)

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes | None:
        if self.world.store.has(object_hash):
            return self.world.store.read_range(object_hash, offset, length)
        return self.world.downloads.partials.read_range(object_hash, offset, length)


@asynccontextmanager
async def downloading(root: Path, *, speed: float = 1.0) -> AsyncIterator[World]:
    """A world without peers."""
    network = MemoryNetwork()
    async with (
        MemoryTransport(network, identity(9)) as client,
        ConnectionPool(client, SHARD, SECRET, "client", clock=lambda: 100 * time.monotonic()) as pool,
    ):
        world = World(network, pool, root, speed)
        async with world.downloads:
            yield world


def make_data(chunks: int, tail: bytes = b"tail", first: int = 1) -> bytes:
    """An object with chunks that differ; the last one is short."""
    return b"".join(bytes([number % 256]) * CHUNK_SIZE for number in range(first, first + chunks)) + tail
