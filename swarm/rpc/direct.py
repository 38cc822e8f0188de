"""Requests over TLS connections of their own, past the daemon: half the latency where a peer can be dialled.

The peer is asked for an offer over its authenticated stream, as for bulk connections (transfer/tls): where to connect,
which certificate to find there, and a token to show. The same frames and sessions then run over it. The server says
nothing to who has not shown a token: until then a connection, its TLS handshake included, costs one of a few places and
a few seconds.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from moehive.protocol import limits
from moehive.protocol.errors import PeerError, PeerRefused, PeerUnreachable, RefusalCode, TransportError
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import BulkOffer, OpenBulk, ProtocolSpec
from moehive.protocol.proofs import RedeemedToken, ShownToken
from moehive.protocol.session import ClientSession, ServerSession
from moehive.swarm.log import get_logger
from moehive.swarm.transfer.tls.certificate import Certificate, client_context, fingerprint_of
from moehive.swarm.transfer.tls.tokens import LIFETIME, Tokens
from moehive.swarm.transport.accepting import BACKLOG, accept_for_ever, open_accepted
from moehive.swarm.transport.addresses import host_and_port, with_port
from moehive.swarm.transport.serving import StreamHandlers
from moehive.swarm.transport.socket_stream import READ_BUFFER, SocketStream

from .client import Connection
from .server import Gate, Inbox, Refusal, RequestHandler, ServedStream, open_gate

MAX_CONNECTIONS = 512
MAX_PER_PEER = 4
MAX_UNADMITTED = 64  # connections that have not shown a token; one more, and the oldest is ended
DIAL_TIMEOUT = 5.0  # seconds for all addresses of an offer together
_RETRY_AFTER = 1.0
_log = get_logger(__name__)


class DirectServer:
    """Takes direct connections of one protocol. An async context manager: entering listens, leaving ends them all.

    Args:
        hosts: IP addresses of the interfaces to listen at; none: no connection is offered.
        port: of all of them; 0 lets the system choose.
    """

    def __init__(
        self,
        spec: ProtocolSpec,
        hosts: Sequence[str],
        port: int,
        *,
        agent: str,
        handle: RequestHandler,
        inbox: Inbox | None = None,
        gate: Gate = open_gate,
    ) -> None:
        self._spec = spec
        self._hosts = tuple(hosts)
        self._port = port
        self._agent = agent
        self._handle = handle
        self._inbox = inbox or Inbox()
        self._gate = gate
        self._certificate = Certificate()
        self._tokens = Tokens()
        self._tasks = StreamHandlers()  # for their supervision
        self._open: Counter[PeerId] = Counter()
        self._unadmitted: OrderedDict[socket.socket, asyncio.Task[None]] = OrderedDict()  # oldest first
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for host in self._hosts:
                listener = stack.enter_context(_listen(host, self._port))
                self._port = self._port or listener.getsockname()[1]  # the same for all
                self._tasks.spawn(accept_for_ever(listener, self._begin), name=f"accept {self._spec.name}")
            stack.push_async_callback(self._tasks.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def offer(self, peer: PeerId, announced: Sequence[str]) -> BulkOffer:
        """What to tell `peer`, which is authenticated. `announced`: the node's own addresses. Raises Refusal."""
        if self._open.total() >= MAX_CONNECTIONS or self._open[peer] >= MAX_PER_PEER:
            raise Refusal(RefusalCode.BUSY, "all direct connections are taken", retry_after=_RETRY_AFTER)
        here = announced if self._hosts else ()
        addresses = dict.fromkeys(filter(None, (with_port(address, self._port) for address in here)))
        return BulkOffer(
            addresses=tuple(addresses)[: limits.MAX_ADDRESSES],
            fingerprint=self._certificate.fingerprint,
            token=self._tokens.issue(peer),
            lifetime=LIFETIME,
        )

    def _begin(self, sock: socket.socket) -> None:
        task = self._tasks.spawn(self._serve(sock), name=f"direct {self._spec.name}")
        task.add_done_callback(lambda _: self._forget(sock))  # a task that is cancelled before it begins runs nothing
        self._unadmitted[sock] = task
        if len(self._unadmitted) > MAX_UNADMITTED:
            self._unadmitted.popitem(last=False)[1].cancel()

    def _forget(self, sock: socket.socket) -> None:
        self._unadmitted.pop(sock, None)
        sock.close()

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, from its first byte to its last."""
        admitted: list[PeerId] = []

        def admit(peer: PeerId) -> bool:
            if self._open[peer] >= MAX_PER_PEER:
                return False
            self._unadmitted.pop(sock, None)
            self._open[peer] += 1
            admitted.append(peer)
            return True

        try:
            context = self._certificate.context
            reader, writer = await open_accepted(sock, tls=context, handshake_timeout=limits.HELLO_TIMEOUT)
            stream = SocketStream(PeerId(""), reader, writer)
            session = ServerSession(self._spec, RedeemedToken(self._tokens.redeem), self._agent)
            served = ServedStream(
                stream,
                session,
                self._handle,
                inbox=self._inbox,
                gate=self._gate,
                admit=admit,
                answers_strangers=False,
            )
            try:
                await served.run()
            finally:
                await stream.close()
        except OSError as error:  # of the handshake
            _log.debug("direct connection not admitted", reason=str(error))
            error.__traceback__ = None  # asyncio's frames in it hold the future that holds the error, and the TLS state
        finally:
            if admitted:
                self._open[admitted[0]] -= 1
                self._open += Counter()  # forgets those at zero


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise TransportError(
            f"cannot take direct connections at {host} port {port}: {error}; choose another --direct-port"
        ) from error
    listener.setblocking(False)
    return listener


async def dial(connection: Connection, agent: str) -> Connection | None:
    """A direct connection to the peer of an open one; None where it offers none, or cannot be reached that way."""
    try:
        answer = await connection.ask(OpenBulk(), timeout=DIAL_TIMEOUT)
        assert isinstance(answer.message, BulkOffer)
        async with asyncio.timeout(DIAL_TIMEOUT):
            return await _first(connection, answer.message, agent)
    except PeerRefused as error:  # no more connections now; or a build that knows of no direct ones
        _log.debug("no direct connection", peer=connection.peer, reason=error.reason)
    except (TimeoutError, PeerError) as error:
        _log.info("peer cannot be dialled; it is asked through the daemon", peer=connection.peer, reason=str(error))
    return None


async def _first(connection: Connection, offer: BulkOffer, agent: str) -> Connection:
    """Over the first of the offered addresses that works. Raises PeerUnreachable, and what its hello raises."""
    reason = "it names no address that can be dialled"
    for host, port in filter(None, map(host_and_port, offer.addresses)):
        try:
            stream = await connect(host, port, offer.fingerprint, connection.peer)
        except OSError as error:
            reason = f"{host} port {port}: {error}"
            error.__traceback__ = None  # as in `_serve`
            continue
        session = ClientSession(connection.spec, ShownToken(offer.token, connection.peer), agent)
        return await Connection(stream, session).__aenter__()
    raise PeerUnreachable(reason, peer=connection.peer)


async def connect(host: str, port: int, fingerprint: bytes, peer: PeerId) -> SocketStream:
    """A stream to whoever shows the certificate; nothing of ours is sent before that. Raises OSError."""
    reader, writer = await asyncio.open_connection(
        host, port, limit=READ_BUFFER, ssl=client_context(), server_hostname="", ssl_shutdown_timeout=0.5
    )
    tls: ssl.SSLObject = writer.get_extra_info("ssl_object")
    if not hmac.compare_digest(fingerprint_of(tls.getpeercert(binary_form=True) or b""), fingerprint):
        writer.transport.abort()
        raise ConnectionRefusedError("it belongs to somebody else")
    return SocketStream(peer, reader, writer)
