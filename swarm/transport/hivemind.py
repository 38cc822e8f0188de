"""The real carrier: streams through the go-libp2p daemon, announcements in hivemind's DHT.

It owns one daemon and one DHT node, in whatever asyncio loop enters it. The daemon can lose the tail of a stream whose
sender closes first and limits nobody, so callers count bytes (see `base.Stream`) and streams per peer are limited here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from moehive.protocol.errors import PeerUnreachable, TransportError
from moehive.protocol.ids import PeerId
from moehive.swarm.identity import Identity

from .accepting import open_accepted
from .addresses import bootstrap_peers, dialable
from .base import Handler, Record
from .daemon import Daemon, read_stream_info
from .dht import Table
from .engine import import_hivemind
from .records import RecordValidator
from .serving import StreamHandlers
from .socket_stream import SocketStream

logger = logging.getLogger(__name__)


class HivemindTransport:
    """Implements `base.Transport`; an async context manager that can be entered once.

    Entering raises ConfigError for addresses that cannot be read, PeerUnreachable when none of `bootstrap` answers, and
    TransportError when the daemon does not start.

    Args:
        identity: our key; it is handed to the daemon through a pipe.
        listen: TCP multiaddrs without /p2p. `/ip4/0.0.0.0/tcp/31337` for all interfaces; port 0 picks a free one.
        bootstrap: full addresses of peers of the swarm to join; none: this peer starts a new one.
        client_only: open streams and read the table, but listen nowhere and store nothing for others.
        announce: addresses to name instead of those of the local interfaces (behind a port forwarding).
        relay: be reachable through, and serve as, a libp2p relay.
        record_validator: asked before a record is stored for somebody or believed.
        connect_timeout: seconds for one `open`, and for reaching the bootstrap peers.
        startup_timeout: seconds for the daemon to start.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        bootstrap: Sequence[str] = (),
        client_only: bool = False,
        announce: Sequence[str] = (),
        relay: bool = False,
        record_validator: RecordValidator | None = None,
        connect_timeout: float = 10.0,
        startup_timeout: float = 15.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._bootstrap = bootstrap_peers(bootstrap)
        self._client_only = client_only
        self._record_validator = record_validator
        self._connect_timeout = connect_timeout
        self._startup_timeout = startup_timeout
        self._clock = clock
        self._daemon = Daemon(
            identity,
            listen=() if client_only else listen,
            announce=announce,
            dht_server=not client_only,
            relay=relay,
            on_stream=self._accept,
        )
        self._handlers = StreamHandlers()
        self._streams: set[SocketStream] = set()
        self._addresses: tuple[str, ...] = ()
        self._table: Table | None = None
        self._stack = AsyncExitStack()

    @property
    def peer(self) -> PeerId:
        """Our own id."""
        return self._identity.peer

    @property
    def addresses(self) -> Sequence[str]:
        """See `base.Transport`; empty for a client."""
        return self._addresses

    async def __aenter__(self) -> Self:
        import_hivemind()  # seconds, which do not count as the daemon's
        async with AsyncExitStack() as stack:
            await self._start_daemon(stack)
            stack.push_async_callback(self._close_streams)
            self._addresses = tuple(f"{address}/p2p/{self.peer}" for address in await self._daemon.addresses())
            self._table = await stack.enter_async_context(
                Table(
                    self._daemon,
                    bootstrap=await self._reach_bootstrap(),
                    client_only=self._client_only,
                    validator=self._record_validator,
                    clock=self._clock,
                )
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def open(self, peer: PeerId, protocol: str, addresses: Sequence[str] = ()) -> SocketStream:
        """See `base.Transport`."""
        hints = dialable(peer, addresses)
        try:
            async with asyncio.timeout(self._connect_timeout):
                if hints:
                    # First, because a daemon that knows no address would search the table. Connected: does nothing.
                    await self._daemon.connect(peer, hints)
                reader, writer = await self._daemon.open_stream(peer, protocol)
        except TimeoutError as error:
            raise PeerUnreachable(f"no connection within {self._connect_timeout:g} s", peer=peer) from error
        return self._stream(peer, reader, writer)

    async def serve(self, protocol: str, handler: Handler) -> None:
        """See `base.Transport`."""
        self._handlers.add(protocol, handler)
        await self._daemon.accept(protocol)

    async def stop_serving(self, protocol: str) -> None:
        """See `base.Transport`."""
        self._handlers.remove(protocol)
        await self._daemon.refuse(protocol)

    async def put(self, key: bytes, subkey: str, record: Record) -> bool:
        """See `base.Transport`."""
        return await self._joined_table().put(key, subkey, record)

    async def get(self, key: bytes) -> Mapping[str, Record]:
        """See `base.Transport`."""
        return await self._joined_table().get(key)

    def _joined_table(self) -> Table:
        assert self._table is not None, "enter the transport first"
        if not self._daemon.alive:
            raise TransportError("p2pd has stopped; restart this peer")
        return self._table

    async def _start_daemon(self, stack: AsyncExitStack) -> None:
        try:
            async with asyncio.timeout(self._startup_timeout):
                await stack.enter_async_context(self._daemon)
        except TimeoutError as error:
            raise TransportError(
                f"p2pd did not start within {self._startup_timeout:g} s; is the machine overloaded, or may it not run?"
            ) from error

    async def _reach_bootstrap(self) -> list[PeerId]:
        """Those of the bootstrap peers that we are connected to now. Raises PeerUnreachable when there is none."""
        peers = list(self._bootstrap)
        results = await asyncio.gather(*(self._reach(peer) for peer in peers), return_exceptions=True)
        reached = [peer for peer, failure in zip(peers, results, strict=True) if failure is None]
        for failure in results:
            if isinstance(failure, PeerUnreachable):
                logger.warning("bootstrap peer not reached: %s", failure)
            elif failure is not None:
                raise failure
        if peers and not reached:
            tried = ", ".join(f"{address}/p2p/{peer}" for peer in peers for address in self._bootstrap[peer])
            raise PeerUnreachable(f"no bootstrap peer answers: {tried}; does it run, and is its port open?")
        return reached

    async def _reach(self, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._daemon.connect(peer, self._bootstrap[peer])
        except TimeoutError as error:
            raise PeerUnreachable(f"no connection within {self._connect_timeout:g} s", peer=peer) from error

    def _accept(self, sock: socket.socket) -> None:
        """The daemon hands over a stream that a peer opened."""
        self._handlers.spawn(self._serve_stream(sock), name="incoming stream")

    async def _serve_stream(self, sock: socket.socket) -> None:
        reader, writer = await open_accepted(sock)
        try:
            peer, protocol = await read_stream_info(reader)
        except BaseException:
            writer.transport.abort()
            raise
        await self._handlers.run(protocol, self._stream(peer, reader, writer))

    def _stream(self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> SocketStream:
        stream = SocketStream(peer, reader, writer, on_close=self._streams.discard)
        self._streams.add(stream)
        return stream

    async def _close_streams(self) -> None:
        await self._handlers.close()
        await asyncio.gather(*(stream.close() for stream in tuple(self._streams)))
