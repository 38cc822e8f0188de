"""An ASGI application at an address of this machine, as a part of an event loop that has other things to do.

uvicorn reads and writes HTTP. It takes no signals here (the command line's own handling ends everything together), logs
nothing of its own, and is bounded: connections, headers, the time that peers may leave unread what they are sent, and
that in which requests may end.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from moehive.protocol.errors import TransportError

from .patience import PatientProtocol

_MAX_HEADERS: Final = 64 << 10  # bytes of one request's
_KEEP_ALIVE: Final = 15  # seconds that an idle connection stays
_BACKLOG: Final = 128
_UNREAD: Final = 30_000  # milliseconds that a peer may leave unread what was sent; then the connection is dropped


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where to listen, or where it is listened: an IP address and a port (0: the system's choice)."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def is_any(self) -> bool:
        """Whether it is all of this machine's addresses, and none that others could connect to."""
        return ipaddress.ip_address(self.host).is_unspecified

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return ipaddress.ip_address(self.host).is_loopback


@asynccontextmanager
async def hosted(app: Any, address: HttpAddress, *, grace: float = 5.0) -> AsyncIterator[HttpAddress]:
    """Serve the ASGI application `app` until the block ends; yields the address with the port that it got.

    At the end new connections are refused, and requests in progress get `grace` seconds. Raises TransportError where
    the address cannot be listened at.
    """
    with _listening(address) as listener:
        server = _Server(_config(app, grace))
        running = asyncio.create_task(server.serve([listener]), name="http")
        try:
            yield HttpAddress(address.host, listener.getsockname()[1])
        finally:
            server.should_exit = True
            await running
            server.abort()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: signals belong to whoever hosts."""
        yield

    def abort(self) -> None:
        """Drop what is left: connections whose peers do not take what was sent."""
        for connection in list(self.server_state.connections):
            transport: asyncio.Transport = connection.transport  # of every protocol of uvicorn
            transport.abort()


def _config(app: Any, grace: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # nonsense from whoever connects is not worth a line of the log for each
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADERS,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(grace)),
    )


@contextmanager
def _listening(address: HttpAddress) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart does not wait for old connections
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD)
        try:
            listener.bind((address.host, address.port))
        except OSError as error:
            other = "; name another port, or 0 for any that is free" if error.errno == errno.EADDRINUSE else ""
            raise TransportError(f"{address.url} cannot be listened at: {error.strerror}{other}") from error
        listener.listen(_BACKLOG)
        yield listener
