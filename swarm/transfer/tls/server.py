"""Where a node takes bulk connections: a listening socket, tokens, and admission.

Strangers can connect, so until a connection has shown a token it costs a bounded place and a few seconds, and learns
nothing: no byte is sent to it beyond the TLS handshake, whose certificate says nothing either.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from moehive.protocol import limits
from moehive.protocol.errors import PeerError, RefusalCode, TransportError
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, BulkOffer
from moehive.protocol.proofs import RedeemedToken
from moehive.protocol.session import Event, ServerSession, State
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.server import Refusal
from moehive.swarm.transfer.background import give_way, start_thread
from moehive.swarm.transfer.supply import Shelf
from moehive.swarm.transfer.uploads import Uploads
from moehive.swarm.transport.accepting import AcceptPace
from moehive.swarm.transport.addresses import host_and_port, with_port

from .certificate import Certificate
from .served import ServedConnection, shut
from .tokens import LIFETIME, Tokens

ADMISSION_TIMEOUT = limits.HELLO_TIMEOUT  # seconds for the handshake and the token together
MAX_UNADMITTED = 32  # connections that have not shown a token; one more, and the oldest is closed
MAX_CONNECTIONS = 256
MAX_PER_PEER = 8
_BACKLOG = 64
_RETRY_AFTER = 1.0  # seconds, for a peer when all connections are taken
_LOOK_EVERY = 0.5  # seconds between looks whether the server is being closed
_STOP_TIMEOUT = 5.0
_SOON = 0.001  # seconds: the least timeout that is one
_HELLO_BYTES = 4 << 10
_log = get_logger(__name__)


class BulkServer:
    """An async context manager: entering listens, leaving ends all connections. `offer` may be called in between.

    Args:
        listen: multiaddrs that the node listens at; the server takes the same interfaces.
        port: of all of them; 0 lets the system choose.
        agent: how this build introduces itself.
        clock: seconds, for the expiry of tokens.

    Entering raises TransportError where the port is taken.
    """

    def __init__(
        self,
        listen: Sequence[str],
        port: int,
        *,
        agent: str,
        shelf: Shelf,
        uploads: Uploads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hosts = interfaces(listen)
        self._port = port
        self._agent = agent
        self._shelf = shelf
        self._uploads = uploads
        self._certificate = Certificate()
        self._tokens = Tokens(clock)
        self._readers = ThreadPoolExecutor(uploads.limits.slots, "bulk read", initializer=give_way)
        self._listeners: list[socket.socket] = []
        self._lock = threading.Lock()  # of what follows
        self._unadmitted: OrderedDict[socket.socket, None] = OrderedDict()  # oldest first
        self._connections: dict[ServedConnection, PeerId] = {}
        self._threads: set[threading.Thread] = set()
        self._closing = False

    async def __aenter__(self) -> Self:
        try:
            for host in self._hosts:
                self._listeners.append(_listen(host, self._port))
                self._port = self._port or self._listeners[0].getsockname()[1]  # the same for all
        except OSError as error:
            self._close_listeners()
            raise TransportError(
                f"cannot take bulk connections at {self._hosts} port {self._port}: {error}; choose another --bulk-port"
            ) from error
        for listener in self._listeners:
            self._start(partial(self._accept, listener), "bulk accept")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closing = True
            unadmitted, connections = tuple(self._unadmitted), tuple(self._connections)
        for sock in (*self._listeners, *unadmitted):
            shut(sock)  # on Linux this wakes a thread that accepts; elsewhere it looks up now and then
        for connection in connections:
            connection.shut()
        await asyncio.to_thread(self._join)
        self._close_listeners()
        self._readers.shutdown(wait=False)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    def offer(self, peer: PeerId, announced: Sequence[str]) -> BulkOffer:
        """What to tell `peer`, which is authenticated. `announced`: the node's own addresses.

        Raises Refusal while all connections are taken.
        """
        with self._lock:
            full = self._full(peer)
        if full:
            raise Refusal(RefusalCode.BUSY, "all bulk connections are taken", retry_after=_RETRY_AFTER)
        addresses = dict.fromkeys(filter(None, (with_port(address, self._port) for address in announced)))
        return BulkOffer(
            addresses=tuple(addresses)[: limits.MAX_ADDRESSES] if self._listeners else (),
            fingerprint=self._certificate.fingerprint,
            token=self._tokens.issue(peer),
            lifetime=LIFETIME,
        )

    # --- threads --------------------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], None], name: str) -> None:
        """Inside or outside the lock."""
        thread = start_thread(work, name)
        self._threads = {thread, *filter(threading.Thread.is_alive, self._threads)}

    def _accept(self, listener: socket.socket) -> None:
        pace = AcceptPace()
        listener.settimeout(_LOOK_EVERY)
        while not self._closing:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # no descriptors left, or a connection that was reset at once
                if self._closing:
                    return
                _log.warning("bulk connection not accepted", reason=str(error))
                time.sleep(_LOOK_EVERY)
                continue
            try:
                self._begin(sock)
            except (OSError, RuntimeError) as error:  # reset already, or no threads left
                _log.warning("bulk connection not served", reason=str(error))
                sock.close()
            time.sleep(pace.after_one())

    def _begin(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tls = self._certificate.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._unadmitted[tls] = None
            if len(self._unadmitted) > MAX_UNADMITTED:
                shut(self._unadmitted.popitem(last=False)[0])
            self._start(partial(self._serve, tls), "bulk")

    def _serve(self, tls: ssl.SSLSocket) -> None:
        """The thread of one connection, from its first byte to its last."""
        connection: ServedConnection | None = None
        try:
            connection = self._admit(tls)
            if connection is not None:
                connection.run()
        except (OSError, PeerError) as error:
            _log.debug("bulk connection not admitted", reason=str(error))
        except Exception:  # noqa: BLE001 - supervision point: one connection's bug must not be lost in its thread
            _log.exception("bulk connection failed: a bug")
        finally:
            with self._lock:
                self._unadmitted.pop(tls, None)
                if connection is not None:
                    self._connections.pop(connection, None)
            tls.close()

    def _admit(self, tls: ssl.SSLSocket) -> ServedConnection | None:
        """Handshake, token, welcome. Raises PeerError, OSError; then not a word is said."""
        deadline = time.monotonic() + ADMISSION_TIMEOUT
        tls.settimeout(ADMISSION_TIMEOUT)  # of the handshake as a whole
        tls.do_handshake()
        session = ServerSession(SHARD, RedeemedToken(self._tokens.redeem), self._agent)
        events: list[Event] = []
        while session.state is State.AWAIT_HELLO:
            tls.settimeout(max(deadline - time.monotonic(), _SOON))
            events = session.receive(tls.recv(_HELLO_BYTES))
        if session.state is not State.OPEN:
            return None
        connection = ServedConnection(tls, session, self._shelf, self._uploads, self._readers, received=events[1:])
        with self._lock:
            self._unadmitted.pop(tls, None)
            if self._closing or self._full(session.peer):
                return None
            self._connections[connection] = session.peer
        tls.settimeout(ADMISSION_TIMEOUT)
        tls.sendall(b"".join(session.send_welcome()))
        return connection

    def _full(self, peer: PeerId) -> bool:
        """Inside the lock."""
        own = sum(other == peer for other in self._connections.values())
        return len(self._connections) >= MAX_CONNECTIONS or own >= MAX_PER_PEER

    def _join(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT
        for thread in tuple(self._threads):
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()


def interfaces(listen: Sequence[str]) -> tuple[str, ...]:
    """The IP addresses of the interfaces in multiaddrs that a node listens at, each once."""
    hosts = [found[0] for found in map(host_and_port, listen) if found is not None]
    return tuple(dict.fromkeys(hosts))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other family has its own
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
