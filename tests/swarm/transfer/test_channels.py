"""One channel per peer: whoever waits for the same attempt learns of its failure on his own."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence

from support.references import without_collector

from moehive.protocol.errors import PeerError, PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.swarm.transfer.channel import ChunkChannel
from moehive.swarm.transfer.channels import Channels
from moehive.swarm.transfer.sources import Source

PEER = PeerId("them")


class Link:
    """What an attempt works on."""


async def test_each_that_waits_gets_an_error_of_its_own_and_nothing_of_the_attempt_is_kept() -> None:
    links: list[weakref.ref[Link]] = []
    blamed: list[str] = []

    async def refused(peer: PeerId, addresses: Sequence[str]) -> ChunkChannel:
        link = Link()
        links.append(weakref.ref(link))
        await asyncio.sleep(0)
        raise PeerUnreachable("nobody there", peer=peer)

    async def two(channels: Channels) -> None:
        attempts = (channels.get(PEER, Source(())) for _ in range(2))
        first, second = await asyncio.gather(*attempts, return_exceptions=True)
        assert isinstance(first, PeerError)
        assert isinstance(second, PeerError)
        assert first is not second
        assert str(first) == str(second) == "peer them: nobody there"

    with without_collector():
        async with asyncio.TaskGroup() as tasks:
            channels = Channels(
                refused, tasks, on_open=lambda *_: None, on_error=lambda error: blamed.append(error.reason)
            )
            await two(channels)
        await asyncio.sleep(0)  # the event loop holds what woke us
        assert blamed == ["nobody there"]
        assert len(links) == 1
        assert links[0]() is None
