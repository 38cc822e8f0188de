"""Chunks over the authenticated streams of the daemon: the carrier that works wherever a peer can be reached at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import PeerError
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import Chunk, ChunkHashes, GetChunkList, GetChunks, GetHave, Have
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.threads import to_its_end

from .channel import Deliver, OpenChannel
from .replies import ExpectedChunks, read_chunk_list, read_have


def stream_channels(pool: ConnectionPool) -> OpenChannel:
    """Opens channels over the pool's connections (of the protocol SHARD)."""

    async def open_channel(peer: PeerId, addresses: Sequence[str]) -> StreamChannel:
        return StreamChannel(await pool.connection(peer, addresses))

    return open_channel


class StreamChannel:
    """A ChunkChannel over one connection, which it closes with itself; the pool then opens another one when asked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def peer(self) -> PeerId:
        """See ChunkChannel."""
        return self._connection.peer

    @property
    def broken(self) -> PeerError | None:
        """See ChunkChannel."""
        return self._connection.broken

    async def chunk_list(self, object_hash: ShardHash, *, timeout: float) -> ChunkList:
        """See ChunkChannel."""
        answer = await self._connection.ask(GetChunkList(hash=object_hash), timeout=timeout)
        assert isinstance(answer.message, ChunkHashes)
        return read_chunk_list(answer.message, answer.payload, object_hash, self.peer)

    async def have(self, object_hash: ShardHash, *, timeout: float) -> frozenset[int] | None:
        """See ChunkChannel."""
        answer = await self._connection.ask(GetHave(hash=object_hash), timeout=timeout)
        assert isinstance(answer.message, Have)
        return read_have(answer.message, answer.payload, self.peer)

    async def get_chunks(
        self, object_hash: ShardHash, first: int, count: int, deliver: Deliver, *, timeout: float
    ) -> None:
        """See ChunkChannel."""
        request, expected = GetChunks(hash=object_hash, first=first, count=count), ExpectedChunks(first, count)
        async with aclosing(self._connection.ask_many(request, timeout=timeout)) as answers:
            async for answer in answers:
                assert isinstance(answer.message, Chunk)
                expected.accept(answer.message, more=answer.more, peer=self.peer)
                with memoryview(answer.payload) as data:
                    await to_its_end(deliver, answer.message.index, data)

    async def close(self) -> None:
        """See ChunkChannel."""
        await self._connection.close()
