"""Two hundred downloaders at once against eight slots: each gets its share, nobody starves, memory stays bounded."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from support.bulk import PATIENCE, SERVER, FakeShelf, data_of, offer_of, serving, soon

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.ids import PeerId
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transfer.tls.dialling import dial
from moehive.swarm.transfer.uploads import Uploads

pytestmark = pytest.mark.slow

DOWNLOADERS = 200
EACH = 4  # chunks
AT_ONCE = 20  # handshakes


@dataclass
class CountingShelf(FakeShelf):
    """Counts the chunks that are in memory: read, and not sent completely yet."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    uploads: Uploads | None = None
    most: int = 0

    def read_range(self, object_hash: str, offset: int, length: int) -> bytes | None:
        assert self.uploads is not None
        with self.lock:
            self.most = max(self.most, len(self.read) - self.uploads.bytes_sent // CHUNK_SIZE)
        return super().read_range(object_hash, offset, length)  # type: ignore[arg-type]


class Downloader:
    """Gets the same chunks over and over, and counts them."""

    def __init__(self, channel: TlsChannel, order: list[int], number: int) -> None:
        self._channel = channel
        self._order = order
        self._number = number

    def __call__(self, index: int, data: memoryview) -> None:
        assert len(data) == CHUNK_SIZE
        self._order.append(self._number)

    async def run(self, shelf: FakeShelf) -> None:
        half = EACH // 2  # two requests in flight
        requests = (self._channel.get_chunks(shelf.hash, first, half, self, timeout=240) for first in (0, half))
        await asyncio.gather(*requests)


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


async def test_two_hundred_downloaders_share_eight_slots() -> None:
    everybody_waits = threading.Event()
    shelf = CountingShelf(data_of(EACH), gate=lambda index: _wait(everybody_waits))
    uploads = shelf.uploads = Uploads()
    order: list[int] = []
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(shelf, uploads))
        places = asyncio.Semaphore(AT_ONCE)

        async def join(number: int) -> Downloader:
            async with places:
                channel = await dial(offer_of(server, PeerId(str(number))), SERVER, "client")
            stack.push_async_callback(channel.close)
            return Downloader(channel, order, number)

        downloaders = await asyncio.gather(*map(join, range(DOWNLOADERS)))
        running = asyncio.gather(*(downloader.run(shelf) for downloader in downloaders))
        assert await soon(lambda: len(uploads._running) + len(uploads._waiting) == DOWNLOADERS)
        everybody_waits.set()
        await running
    assert len(order) == DOWNLOADERS * EACH
    assert uploads.bytes_sent == len(order) * CHUNK_SIZE
    # Fair: when half of all chunks have arrived, nobody is far ahead and nobody is left out.
    arrived = [order[: len(order) // 2].count(number) for number in range(DOWNLOADERS)]
    assert min(arrived) >= 1
    assert max(arrived) <= EACH - 1
    # Bounded: what is running, and what was read ahead for it.
    assert shelf.most <= 3 * uploads.limits.slots
