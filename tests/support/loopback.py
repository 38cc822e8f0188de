"""A transport over TCP sockets on loopback, for tests with real processes that need no daemon and no table of records.

It believes whoever calls; only the real transports authenticate. What breaks in a socket breaks here: half-sent frames,
processes that are killed, peers that trickle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.swarm.transport.base import Buffer, Handler, Record, Stream
from moehive.swarm.transport.serving import StreamHandlers
from moehive.swarm.transport.socket_stream import SocketStream


class LoopbackTransport:
    """Implements `base.Transport`, without a table. `addresses` of a peer: its port, as a text."""

    def __init__(self, peer: str) -> None:
        self._peer = PeerId(peer)
        self._handlers = StreamHandlers()
        self._server: asyncio.Server | None = None
        self._streams: set[SocketStream] = set()

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> Sequence[str]:
        assert self._server is not None
        return (str(self._server.sockets[0].getsockname()[1]),)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self._handlers.close()
        for stream in tuple(self._streams):
            await stream.close()

    async def open(self, peer: PeerId, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(addresses[0]))
            writer.write(f"{self._peer}\n{protocol}\n".encode())
            answer = (await reader.readuntil(b"\n"))[:-1]
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise PeerUnreachable(f"no connection: {error}", peer=peer) from error
        if answer != peer.encode():
            writer.transport.abort()
            raise PeerUnreachable("somebody else answers there", peer=peer)
        return self._stream(peer, reader, writer)

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers.add(protocol, handler)

    async def stop_serving(self, protocol: str) -> None:
        self._handlers.remove(protocol)

    async def put(self, key: bytes, subkey: str, record: Record) -> bool:
        raise NotImplementedError

    async def get(self, key: bytes) -> Mapping[str, Record]:
        raise NotImplementedError

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = PeerId((await reader.readuntil(b"\n"))[:-1].decode())
            protocol = (await reader.readuntil(b"\n"))[:-1].decode()
        except (OSError, asyncio.IncompleteReadError):  # killed while it dialled
            writer.transport.abort()
            return
        writer.write(f"{self._peer}\n".encode())
        self._handlers.spawn(self._handlers.run(protocol, self._stream(peer, reader, writer)), name="incoming stream")

    def _stream(self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SocketStream:
        stream = SocketStream(peer, reader, writer, on_close=self._streams.discard)
        self._streams.add(stream)
        return stream


class StreamThatStops:
    """A stream whose writes go through up to a number of bytes, and then not at all, or one byte at a time."""

    def __init__(self, stream: Stream, after: int, *, stopped: asyncio.Event, trickle: float | None = None) -> None:
        self._stream = stream
        self._left = after
        self._stopped = stopped
        self._trickle = trickle  # seconds between two bytes; None: nothing more

    @property
    def peer(self) -> PeerId:
        return self._stream.peer

    async def read(self, limit: int) -> bytes:
        return await self._stream.read(limit)

    async def write(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            await self._stream.write(view[: self._left])
            rest = view[self._left :]
            self._left = max(0, self._left - len(view))
            if not self._left and rest:
                self._stopped.set()
                for byte in rest if self._trickle is not None else ():
                    await asyncio.sleep(self._trickle or 0.0)
                    await self._stream.write(bytes([byte]))
                if self._trickle is None:
                    await asyncio.Event().wait()

    async def close(self) -> None:
        with suppress(PeerUnreachable):
            await self._stream.close()
