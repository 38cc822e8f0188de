"""A byte stream over a pair of asyncio streams, with asyncio's errors translated into ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId

from .base import Buffer, joined_head

# The selector loop receives at most 256 KiB at a time; a reader that buffers less pauses and resumes for every piece.
READ_BUFFER = 1 << 20
_MAX_READ = 256 << 10  # taking more out of the buffer at once moves the rest of it in memory
_WRITE_PIECE = 256 << 10  # what the loop cannot send at once it copies: this bounds the copy
_JOIN_BELOW = 64 << 10  # a header and its small body leave in one system call
_CLOSE_TIMEOUT = 0.8


class SocketStream:
    """Implements `base.Stream`.

    One `write` at a time reaches the socket, whole: two tasks may write to the same stream. A write that is cancelled
    may have sent a part; the stream is then good for nothing but closing. One task at a time may read.

    Small writes of one turn of the event loop leave together, but for the first, which never waits: when a batch has
    been computed, its answers to one peer are written by as many tasks at the same time, and a system call and a TLS
    record for each would cost more than all else about them.

    asyncio's reader keeps the error that ended the connection, and the same one is raised wherever somebody waits. Its
    traceback would hold the frames of that, and so the reader: a cycle around every lost connection.
    """

    def __init__(
        self,
        peer: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_close: Callable[[SocketStream], None] = lambda _: None,
    ) -> None:
        self._peer = peer
        self._reader = reader
        self._writer = writer
        self._socket = writer.get_extra_info("socket")
        self._on_close = on_close
        self._writing = asyncio.Lock()
        self._closed = False
        self._joined: list[bytes] | None = None  # small writes of this turn after the first; None before that
        self._joined_bytes = 0
        writer.transport.set_write_buffer_limits(high=_WRITE_PIECE)

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._peer

    async def read(self, limit: int) -> bytes:
        """See `base.Stream`."""
        assert limit > 0, limit
        try:
            data = await self._reader.read(min(limit, _MAX_READ))
        except OSError as error:
            reason = f"connection lost while reading: {error}"
            raise PeerUnreachable(reason, peer=self._peer) from error.with_traceback(None)
        if self._closed:
            raise PeerUnreachable("the stream was closed on this side", peer=self._peer)
        return data

    async def write(self, *buffers: Buffer) -> None:
        """See `base.Stream`."""
        views = joined_head(buffers, _JOIN_BELOW)
        async with self._writing:
            if sum(len(view) for view in views) <= _JOIN_BELOW:
                await self._send_small(b"".join(views))
                return
            self._flush()
            for view in views:
                for start in range(0, len(view), _WRITE_PIECE):
                    await self._send(view[start : start + _WRITE_PIECE])

    async def close(self) -> None:
        """See `base.Stream`."""
        if self._closed:
            return
        self._closed = True
        self._on_close(self)
        self._flush()
        self._writer.close()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._writer.wait_closed()
        except OSError as error:  # TimeoutError too: the other side does not read what is left in our buffer
            error.__traceback__ = None
        finally:
            self._abort()

    def _abort(self) -> None:
        """Nothing, where it closed in time: asyncio's own fails then, if bytes were left when it was told to close."""
        if self._socket.fileno() >= 0:
            self._writer.transport.abort()

    async def _send_small(self, data: bytes) -> None:
        if self._joined is None:
            self._joined = []
            asyncio.get_running_loop().call_soon(self._flush)
            await self._send(data)
            return
        self._joined.append(data)
        self._joined_bytes += len(data)
        if self._joined_bytes > _JOIN_BELOW:  # the other side can begin with these while we go on
            self._flush()
        await self._drained()

    def _flush(self) -> None:
        joined, self._joined, self._joined_bytes = self._joined, None, 0
        if joined and not self._writer.is_closing():
            self._writer.write(b"".join(joined))

    async def _send(self, data: Buffer) -> None:
        self._check_open()
        self._writer.write(data)
        await self._drained()

    async def _drained(self) -> None:
        self._check_open()
        try:
            await self._writer.drain()
        except OSError as error:
            reason = f"connection lost while writing: {error}"
            raise PeerUnreachable(reason, peer=self._peer) from error.with_traceback(None)

    def _check_open(self) -> None:
        # asyncio accepts and drops what is written after the connection was lost.
        if self._closed or self._writer.is_closing():
            raise PeerUnreachable("the stream is closed", peer=self._peer)
