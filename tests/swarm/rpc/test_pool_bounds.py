"""What a pool remembers of peers does not grow with the number of peers that ever existed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from support.swarm_fakes import SECRET, identity

from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, ChunkHashes, GetChunkList
from moehive.swarm.rpc import pool as module
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

ASKED = GetChunkList(hash=ShardHash("ab" * 32))
PEERS = [identity(number) for number in range(10, 16)]


async def answer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    await reply(ChunkHashes(size=1))


@pytest.fixture
async def pool() -> AsyncIterator[ConnectionPool]:
    """With PEERS on its network. No time passes: what is not dialled again yet stays so."""
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        for key in PEERS:
            server = await stack.enter_async_context(MemoryTransport(network, key))
            await server.serve(SHARD.name, stream_handler(SHARD, SECRET, server.peer, "server", answer))
        client = await stack.enter_async_context(MemoryTransport(network, identity(1)))
        yield await stack.enter_async_context(ConnectionPool(client, SHARD, SECRET, "client", clock=lambda: 0.0))


async def test_idle_connections_give_way(pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    first = await pool.connection(PEERS[0].peer)
    for key in PEERS:
        assert (await (await pool.connection(key.peer)).ask(ASKED, timeout=60)).message == ChunkHashes(size=1)
        assert len(pool._open) <= 2
    assert first.broken is not None
    assert list(pool._open) == [key.peer for key in PEERS[-2:]]  # those used last
    assert (await (await pool.connection(PEERS[0].peer)).ask(ASKED, timeout=60)).message == ChunkHashes(size=1)


async def test_connections_to_peers_that_are_gone_are_not_kept(pool: ConnectionPool) -> None:
    gone, stays, new = (key.peer for key in PEERS[:3])
    connection = await pool.connection(gone)
    await pool.connection(stays)
    await connection.close()
    await pool.connection(new)
    assert list(pool._open) == [stays, new]


async def test_locks_live_as_long_as_they_are_held(pool: ConnectionPool) -> None:
    for key in PEERS:
        await pool.connection(key.peer)
    assert len(pool._locks) == 0


async def test_of_peers_that_cannot_be_reached_the_latest_are_remembered(
    pool: ConnectionPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BACKOFFS", 3)
    strangers = [identity(number).peer for number in range(100, 110)]
    for stranger in strangers:
        with pytest.raises(PeerUnreachable, match="no such peer"):
            await pool.connection(stranger)
    assert list(pool._backoff) == strangers[-3:]
    with pytest.raises(PeerUnreachable, match="not dialled again yet"):
        await pool.connection(strangers[-1])


async def test_of_a_failed_attempt_only_its_reason_is_kept(pool: ConnectionPool) -> None:
    with pytest.raises(PeerUnreachable) as first:
        await pool.connection(identity(90).peer)
    failure = weakref.ref(first.value)
    del first
    gc.collect()
    assert failure() is None  # its traceback holds sockets and buffers
    with pytest.raises(PeerUnreachable, match="not dialled again yet"):
        await pool.connection(identity(90).peer)
