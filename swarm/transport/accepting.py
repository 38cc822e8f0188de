"""Takes connections at a listening socket no faster than a node can afford: others must not feel a flood of them.

Whoever opens connections in a loop costs a node's event loop some tenths of a millisecond for each, also where each is
turned away at once. So they are taken a burst at a time and then at a steady rate; what waits meanwhile waits in the
kernel, whose queue is short, and is refused there. Requests on connections that are open do not wait for newcomers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable

from .socket_stream import READ_BUFFER

BACKLOG = 128
RATE = 200.0  # connections per second
BURST = 64.0  # of them at once
_AGAIN = 0.5  # seconds, after one could not be taken: no descriptors left
logger = logging.getLogger(__name__)


class AcceptPace:
    """How long to wait between connections."""

    def __init__(
        self, rate: float = RATE, burst: float = BURST, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._taken = 0.0  # above what the rate has allowed so far
        self._at = clock()

    def after_one(self) -> float:
        """Count one connection that was taken; the seconds to wait before the next one."""
        now = self._clock()
        self._taken = max(self._taken - (now - self._at) * self._rate, 0.0) + 1.0
        self._at = now
        return max(self._taken - self._burst, 0.0) / self._rate


async def accept_for_ever(listener: socket.socket, begin: Callable[[socket.socket], object]) -> None:
    """Call `begin` with every connection that comes to a listening, non-blocking socket; until cancelled."""
    loop, pace = asyncio.get_running_loop(), AcceptPace()
    while True:
        try:
            sock, _ = await loop.sock_accept(listener)
        except OSError as error:
            logger.warning("a connection could not be taken: %s", error)
            await asyncio.sleep(_AGAIN)
            continue
        begin(sock)
        await asyncio.sleep(pace.after_one())


async def open_accepted(
    sock: socket.socket, *, tls: ssl.SSLContext | None = None, handshake_timeout: float | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The streams of an accepted connection, after its TLS handshake if there is to be one. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(READ_BUFFER)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol,
        sock,
        ssl=tls,
        ssl_handshake_timeout=handshake_timeout,
        ssl_shutdown_timeout=0.5 if tls else None,
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
