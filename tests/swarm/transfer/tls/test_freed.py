"""What a channel leaves behind when its connection is lost: nothing, without the collector of cycles. Real sockets."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest
from support.bulk import PATIENCE, FakeShelf, Gate, channel_to, data_of, get, serving, soon
from support.references import without_collector

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import ShardHash
from moehive.swarm.transfer.tls.link import TlsLink
from moehive.swarm.transfer.tls.server import BulkServer


@pytest.mark.parametrize("busy", [False, True])
async def test_a_connection_that_was_lost_is_freed_at_once(busy: bool) -> None:
    """With the buffers of its threads, over a MiB each, also where requests and questions were waiting on it."""
    shelf, gate = FakeShelf(data_of(12)), Gate()
    shelf.gate = gate

    async def lost(server: BulkServer) -> tuple[weakref.ref[TlsLink], list[weakref.ref[threading.Thread]]]:
        async with channel_to(server) as channel:
            waiting = []
            if busy:
                waiting = [asyncio.create_task(get(channel, shelf, first, 4)) for first in (0, 4)]
                await asyncio.to_thread(gate.reached.wait, PATIENCE)
                waiting.append(asyncio.create_task(channel.have(ShardHash("0" * 64), timeout=PATIENCE)))
                waiting.append(asyncio.create_task(get(channel, shelf, 8, 4)))
                await asyncio.sleep(0)
            for connection in tuple(server._connections):
                connection.shut()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert await soon(lambda: channel.broken is not None)
            with pytest.raises(PeerUnreachable):
                await channel.have(shelf.hash, timeout=PATIENCE)
            return weakref.ref(channel._link), [weakref.ref(thread) for thread in channel._threads]

    async with serving(shelf) as server:
        with without_collector():
            link, threads = await lost(server)
            assert await soon(lambda: link() is None)
            assert await soon(lambda: not any(thread() for thread in threads))
        gate.open()
