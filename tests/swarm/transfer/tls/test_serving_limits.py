"""What the server's uploads allow a client, seen from its channel: rate, places, and the count. Real sockets."""

from __future__ import annotations

import asyncio

import pytest
from support.bulk import (
    CHUNKS,
    PATIENCE,
    Collected,
    FakeShelf,
    Gate,
    channel_to,
    get,
    serving,
    soon,
)

from moehive.protocol.errors import PeerRefused, PeerTimeout, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.transfer.uploads import Uploads


async def test_the_server_sends_no_sooner_than_the_rate_allows(shelf: FakeShelf) -> None:
    class OneChunkADay(Uploads):
        def pay(self, size: int) -> float:
            return 0.0 if self.bytes_sent == 0 else 86_400.0

    collected = Collected()
    async with serving(shelf, OneChunkADay()) as server, channel_to(server) as channel:
        with pytest.raises(PeerTimeout):
            await channel.get_chunks(shelf.hash, 0, 4, collected, timeout=2.0)
    assert collected.indices == [0]


async def test_who_comes_when_too_many_wait_is_told_when_to_come_back(shelf: FakeShelf) -> None:
    gate = Gate()
    shelf.gate, uploads = gate, Uploads(UploadLimits(slots=1, waiting=1))
    async with (
        serving(shelf, uploads) as server,
        channel_to(server, PeerId("1")) as first,
        channel_to(server, PeerId("2")) as second,
        channel_to(server, PeerId("3")) as third,
    ):
        served = [asyncio.create_task(get(first, shelf, 0, 1))]
        await asyncio.to_thread(gate.reached.wait, PATIENCE)
        served.append(asyncio.create_task(get(second, shelf, 1, 1)))
        assert await soon(lambda: uploads.contended)
        with pytest.raises(PeerRefused) as refused:
            await get(third, shelf, 2, 1)
        assert refused.value.code is RefusalCode.BUSY
        assert refused.value.retry_after > 0
        gate.open()
        await asyncio.gather(*served)
        assert (await get(third, shelf, 2, 1)).indices == [2]


async def test_bytes_are_counted(shelf: FakeShelf) -> None:
    uploads = Uploads()
    async with serving(shelf, uploads) as server, channel_to(server) as channel:
        await get(channel, shelf, 0, CHUNKS + 1)
        await channel.have(shelf.hash, timeout=PATIENCE)
    assert uploads.bytes_sent == len(shelf.data)
