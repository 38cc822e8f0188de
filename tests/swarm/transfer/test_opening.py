"""Which way to a peer's bytes is taken: its own connection, its stream when that fails, and for how long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from support.bulk import PATIENCE, Collected, FakeShelf, data_of, impostor, offer_at, offer_of, serving
from support.swarm_fakes import SECRET, Clock, identity

from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerError, PeerUnreachable, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, BulkOffer, OpenBulk
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Refusal, Reply, stream_handler
from moehive.swarm.transfer import opening as module
from moehive.swarm.transfer.channel import ChunkChannel
from moehive.swarm.transfer.opening import FIRST_PAUSE, MAX_PAUSE, ChannelOpener
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SHELF = FakeShelf(data_of(3))
US, THEM = identity(1), identity(2)


@dataclass
class ByStream:
    """Stands for the channel over the stream."""

    connection: Connection


@dataclass
class World:
    """A peer that answers OpenBulk as `offer` says, and our opener."""

    server: BulkServer
    clock: Clock = field(default_factory=Clock)
    asked: int = 0
    offer: Callable[[], BulkOffer] = offer_at
    opener: ChannelOpener | None = None

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        assert isinstance(message, OpenBulk)
        assert peer == US.peer
        self.asked += 1
        await reply(self.offer())

    async def open(self) -> type[ChunkChannel] | type[ByStream]:
        """Open a channel, use it, close it: its type."""
        assert self.opener is not None
        channel = await self.opener(THEM.peer, ())
        if isinstance(channel, TlsChannel):
            collected = Collected()
            await channel.get_chunks(SHELF.hash, 0, 4, collected, timeout=PATIENCE)
            assert collected.bytes == SHELF.data
            assert channel.peer == THEM.peer
            await channel.close()
        return type(channel)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        built = World(await stack.enter_async_context(serving(SHELF)))
        built.offer = lambda: offer_of(built.server, US.peer)
        ours = await stack.enter_async_context(MemoryTransport(network, US))
        theirs = await stack.enter_async_context(MemoryTransport(network, THEM))
        await theirs.serve(SHARD.name, stream_handler(SHARD, SECRET, THEM.peer, "them", built))
        pool = await stack.enter_async_context(ConnectionPool(ours, SHARD, SECRET, "us"))
        built.opener = ChannelOpener(pool, "us", ByStream, clock=built.clock)  # type: ignore[arg-type]
        yield built


async def test_the_peers_own_connection_is_preferred(world: World) -> None:
    assert await world.open() is TlsChannel
    assert await world.open() is TlsChannel


async def test_a_peer_that_takes_no_connections(world: World) -> None:
    world.offer = offer_at
    assert await world.open() is ByStream


async def test_a_closed_port(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    world.offer = lambda: offer_at(port)
    assert await world.open() is ByStream


async def test_an_address_of_somebody_else(world: World) -> None:
    def http(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with impostor(http) as port:
        world.offer = lambda: offer_at(port)
        assert await world.open() is ByStream


async def test_an_address_that_swallows_everything(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIAL_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        world.offer = lambda: offer_at(silent.getsockname()[1])
        assert await world.open() is ByStream


async def test_a_token_that_is_too_old(world: World) -> None:
    stale = BulkOffer(
        addresses=world.offer().addresses, fingerprint=world.offer().fingerprint, token=bytes(32), lifetime=0.0
    )
    world.offer = lambda: stale
    assert await world.open() is ByStream


async def test_what_could_not_be_dialled_is_not_dialled_again_for_a_while(world: World) -> None:
    good, world.offer = world.offer, offer_at
    assert await world.open() is ByStream
    world.offer = good
    assert await world.open() is ByStream
    assert world.asked == 1
    world.clock.now += FIRST_PAUSE
    assert await world.open() is TlsChannel
    assert await world.open() is TlsChannel
    assert world.asked == 3


async def test_the_pause_doubles_to_a_limit_and_a_success_forgets_it(world: World) -> None:
    good, world.offer = world.offer, offer_at
    pause = FIRST_PAUSE
    for count in range(1, 10):
        assert await world.open() is ByStream
        world.clock.now += pause - 1
        assert await world.open() is ByStream
        assert world.asked == count
        world.clock.now += 1
        pause = min(2 * pause, MAX_PAUSE)
    world.offer = good
    assert await world.open() is TlsChannel
    world.offer = offer_at
    assert await world.open() is ByStream
    world.clock.now += FIRST_PAUSE
    world.offer = good
    assert await world.open() is TlsChannel


async def test_a_peer_without_a_free_connection_is_asked_again_next_time(world: World) -> None:
    good = world.offer

    def busy() -> BulkOffer:
        raise Refusal(RefusalCode.BUSY, retry_after=1.0)

    world.offer = busy
    assert await world.open() is ByStream
    world.offer = good
    assert await world.open() is TlsChannel


async def test_a_peer_whose_stream_fails_is_an_error(world: World) -> None:
    def broken() -> BulkOffer:
        raise PeerUnreachable("gone")

    world.offer = broken
    with pytest.raises(PeerError):
        await world.open()


async def test_cancelling_while_dialling_leaves_nothing_open(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        world.offer = lambda: offer_at(silent.getsockname()[1])
        opening = asyncio.create_task(world.open())
        accepted, _ = await asyncio.to_thread(silent.accept)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        with accepted:
            accepted.settimeout(PATIENCE)
            while accepted.recv(4096):
                pass


async def test_the_peers_that_are_remembered_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 1)
    assert world.opener is not None
    for number in range(5):
        world.opener._remember(PeerId(str(number)), "closed")
    assert list(world.opener._undialable) == ["4"]
