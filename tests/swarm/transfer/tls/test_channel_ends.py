"""How a client's channel ends: closed here, by the server, or lost. Real sockets."""

from __future__ import annotations

import asyncio

import pytest
from support.bulk import CHUNKS, PATIENCE, Collected, FakeShelf, Gate, channel_to, get, serving, soon

from moehive.protocol.errors import PeerUnreachable
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.uploads import Uploads


async def test_a_connection_that_is_lost_fails_everything_and_stays_broken(shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    async with serving(shelf) as server, channel_to(server) as channel:
        running = [asyncio.create_task(get(channel, shelf, first, 4)) for first in (0, 4, 8)]
        asking = asyncio.create_task(channel.chunk_list(shelf.hash, timeout=PATIENCE))
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        for connection in tuple(server._connections):
            connection.shut()
        results = await asyncio.gather(*running, asking, return_exceptions=True)
        assert [type(result) for result in results] == [PeerUnreachable] * 4
        assert isinstance(channel.broken, PeerUnreachable)
        with pytest.raises(PeerUnreachable):
            await get(channel, shelf, 0, 1)
        with pytest.raises(PeerUnreachable):
            await channel.have(shelf.hash, timeout=PATIENCE)
        gate.open()


async def test_closing_fails_what_runs_and_ends_the_threads(server: BulkServer, shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate = gate
    async with channel_to(server) as channel:
        running = asyncio.create_task(get(channel, shelf, 0, 4))
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        await asyncio.gather(channel.close(), channel.close())
        with pytest.raises(PeerUnreachable):
            await running
        await channel.close()
        assert not any(thread.is_alive() for thread in channel._threads)
        gate.open()
    assert await soon(lambda: not server._connections)


async def test_closing_waits_for_a_delivery(
    server: BulkServer, shelf: FakeShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes may take away what `deliver` writes to."""
    monkeypatch.setattr("moehive.swarm.transfer.tls.channel._CLOSE_TIMEOUT", PATIENCE)  # a busy machine takes seconds
    gate = Gate()
    collected = Collected(gate)
    async with channel_to(server) as channel:
        running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, 4, collected, timeout=PATIENCE))
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        closing = asyncio.create_task(channel.close())
        await asyncio.wait((closing,), timeout=0.1)
        assert not closing.done()
        gate.open()
        await closing
        with pytest.raises(PeerUnreachable):
            await running
        count = len(collected.chunks)
    assert len(collected.chunks) == count


async def test_closing_does_not_wait_for_ever(
    server: BulkServer, shelf: FakeShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moehive.swarm.transfer.tls.channel._CLOSE_TIMEOUT", 0.01)
    gate = Gate()
    async with channel_to(server) as channel:
        running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, 4, Collected(gate), timeout=PATIENCE))
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        await channel.close()
        assert not running.done()
        gate.open()
        with pytest.raises(PeerUnreachable):
            await running


async def test_what_has_come_and_was_not_looked_at_is_dropped_by_closing(shelf: FakeShelf) -> None:
    """Requests that run fail, however much of their answers the system holds for us."""
    gate, uploads = Gate(), Uploads(UploadLimits())
    async with serving(shelf, uploads) as server, channel_to(server) as channel:
        held = Collected(gate)
        running = [asyncio.create_task(channel.get_chunks(shelf.hash, CHUNKS, 1, held, timeout=PATIENCE))]
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        running += [asyncio.create_task(get(channel, shelf, CHUNKS, 1)) for _ in range(3)]  # one waits in a thread
        assert await soon(lambda: uploads.bytes_sent == 4 * len(shelf.data[-5:]))  # over loopback: it has come
        closing = asyncio.create_task(channel.close())
        assert await soon(lambda: channel._link.is_shut)
        gate.open()
        await closing
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert [isinstance(end, PeerUnreachable) for end in ends[2:]] == [True, True]


async def test_what_was_received_before_the_connection_was_lost_is_delivered(shelf: FakeShelf) -> None:
    async with serving(shelf) as server, channel_to(server) as channel:
        gate = Gate()
        shelf.gate = lambda index: gate(index) if index == 5 else None
        collected = Collected()
        running = asyncio.create_task(channel.get_chunks(shelf.hash, 0, 8, collected, timeout=PATIENCE))
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        assert await soon(lambda: len(collected.chunks) == 5)
        for connection in tuple(server._connections):
            connection.shut()
        with pytest.raises(PeerUnreachable):
            await running
        gate.open()
        assert collected.bytes == shelf.data[: 5 << 20]


async def test_an_idle_connection_is_closed_by_the_server(shelf: FakeShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.swarm.transfer.tls.served.IDLE_TIMEOUT", 0.1)
    async with serving(shelf) as server, channel_to(server) as channel:
        assert await soon(lambda: channel.broken is not None)
        assert await soon(lambda: not server._connections)
        with pytest.raises(PeerUnreachable):
            await channel.have(shelf.hash, timeout=PATIENCE)
