"""One channel per peer, opened when first needed, shared by all downloads, and closed when it is of no use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from moehive.protocol.errors import PeerError, PeerTimeout
from moehive.protocol.ids import PeerId

from .channel import ChunkChannel, OpenChannel
from .sources import Source

MAX_CHANNELS = 64  # beyond that, an idle one is closed for each that is opened
OPEN_TIMEOUT = 15.0  # seconds


class Channels:
    """Open channels by peer. `on_open` and `on_error` are called once for each attempt, however many wait for it."""

    def __init__(
        self,
        open_channel: OpenChannel,
        tasks: asyncio.TaskGroup,
        *,
        on_open: Callable[[PeerId, Source], None],
        on_error: Callable[[PeerError], None],
    ) -> None:
        self._open_channel = open_channel
        self._tasks = tasks
        self._on_open = on_open
        self._on_error = on_error
        self._channels: dict[PeerId, ChunkChannel] = {}
        self._opening: dict[PeerId, asyncio.Task[ChunkChannel | PeerError]] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._channels

    def __iter__(self) -> Iterator[PeerId]:
        return iter(tuple(self._channels))

    def __getitem__(self, peer: PeerId) -> ChunkChannel:
        return self._channels[peer]

    async def get(self, peer: PeerId, source: Source) -> ChunkChannel:
        """The channel to a peer, opened where there is none. Raises PeerError."""
        if peer in self._channels:
            return self._channels[peer]
        if peer not in self._opening:
            self._opening[peer] = self._tasks.create_task(self._open(peer, source), name=f"open {peer}")
        result = await asyncio.shield(self._opening[peer])
        if isinstance(result, PeerError):
            raise result.afresh()  # several may wait, and this frame holds `result`
        return result

    def close(self, peer: PeerId) -> None:
        """Give a peer's channel up, in the background."""
        if channel := self._channels.pop(peer, None):
            self._tasks.create_task(channel.close(), name=f"close {peer}")

    def close_all(self) -> None:
        """Give all of them up, also those that are being opened."""
        for opening in self._opening.values():
            opening.cancel()
        for peer in self:
            self.close(peer)

    async def _open(self, peer: PeerId, source: Source) -> ChunkChannel | PeerError:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                channel = await self._open_channel(peer, source.addresses)
        except PeerError as error:
            return self._failed(peer, error)
        except TimeoutError:
            return self._failed(peer, PeerTimeout(f"no channel within {OPEN_TIMEOUT:.0f} s", peer=peer))
        finally:
            del self._opening[peer]
        self._channels[peer] = channel
        self._on_open(peer, source)
        return channel

    def _failed(self, peer: PeerId, error: PeerError) -> PeerError:
        error.peer = error.peer or peer
        self._on_error(error)
        return error
