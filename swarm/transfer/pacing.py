"""Bytes on a connection that also carries activations: in small pieces, at a rate that leaves room between them.

Where a peer cannot be dialled, its bytes come through the daemon, whose streams share one connection per pair of peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from moehive.protocol.ids import PeerId
from moehive.swarm.transport.base import Buffer, Handler, Stream, joined_head

from .uploads import PIECE, Uploads

_LARGE_PIECE = 256 << 10  # bytes, where nobody waits behind them


class PacedStream:
    """A `Stream` whose writes pay for themselves in `uploads` first."""

    def __init__(self, stream: Stream, uploads: Uploads) -> None:
        self._stream = stream
        self._uploads = uploads
        self._writing = asyncio.Lock()

    @property
    def peer(self) -> PeerId:
        """See `Stream`."""
        return self._stream.peer

    async def read(self, limit: int) -> bytes:
        """See `Stream`."""
        return await self._stream.read(limit)

    async def write(self, *buffers: Buffer) -> None:
        """See `Stream`."""
        async with self._writing:  # several writes below are one to our callers
            for piece in self._pieces(buffers):
                pause = self._uploads.pay_beside(self.peer, len(piece))
                if pause:
                    await asyncio.sleep(pause)
                await self._stream.write(piece)

    async def close(self) -> None:
        """See `Stream`."""
        await self._stream.close()

    def _pieces(self, buffers: tuple[Buffer, ...]) -> Iterator[Buffer]:
        views = joined_head(buffers, PIECE)
        if sum(map(len, views)) <= PIECE:
            yield b"".join(views)
            return
        for view in views:
            start = 0
            while start < len(view):  # whether it must be small may change meanwhile
                size = PIECE if self._uploads.beside(self.peer) or self._uploads.rate is not None else _LARGE_PIECE
                yield view[start : start + size]
                start += size


def paced(handler: Handler, uploads: Uploads) -> Handler:
    """`handler`, on streams that are paced."""

    async def on_stream(stream: Stream) -> None:
        await handler(PacedStream(stream, uploads))

    return on_stream
