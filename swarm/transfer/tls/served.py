"""The server's end of one admitted bulk connection: one thread, which reads requests and writes their answers.

Requests are answered one after the other, small ones first, each answer in an upload turn of its own. Between two
chunks the thread looks whether the client has asked for more or withdrawn something. Everything has a deadline: a
client that does not read, or sends requests byte by byte, costs its own connection and nothing else.
"""

from __future__ import annotations

import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from socket import SHUT_RDWR, socket

from moehive.protocol.errors import LocalError, PeerUnreachable, ProtocolViolation, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import GetChunks
from moehive.protocol.session import Buffers, Closed, Event, RequestCancelled, RequestReceived, ServerSession
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.server import Refusal
from moehive.swarm.transfer.supply import Answer, Shelf, answers
from moehive.swarm.transfer.uploads import PIECE, Turn, Uploads

READ_SIZE = 64 << 10
WRITE_TIMEOUT = 60.0  # seconds in which a client takes one frame
IDLE_TIMEOUT = 300.0  # seconds without a complete request
_LOOK_EVERY = 0.5  # seconds between looks at the client while waiting for a turn
_log = get_logger(__name__)


class _Withdrawn(Exception):
    """The request that is being answered is not wanted any more."""


class ServedConnection:
    """`run()` is the thread; `shut` may be called from any.

    `sock` is past its handshake and `session` is open; `received` is what came with the greeting. `readers` read ahead:
    the next chunk while one is being sent.
    """

    def __init__(
        self,
        sock: ssl.SSLSocket,
        session: ServerSession,
        shelf: Shelf,
        uploads: Uploads,
        readers: Executor,
        *,
        received: Sequence[Event] = (),
    ) -> None:
        self._sock = sock
        self._session = session
        self._shelf = shelf
        self._uploads = uploads
        self._readers = readers
        self._todo: deque[RequestReceived] = deque()
        self._answering: set[int] = set()  # ids of the requests that are being answered: one, and a question in between
        self._unwanted: set[int] = set()  # those of them that were withdrawn meanwhile
        self._turn: Turn | None = None
        self._ending = threading.Event()
        self._received = received
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    @property
    def peer(self) -> PeerId:
        """Whose token opened it."""
        return self._session.peer

    def shut(self) -> None:
        """End the connection and wake its thread."""
        self._ending.set()
        shut(self._sock)

    def run(self) -> None:
        """Serve until the client closes, stalls or breaks the protocol, or until `shut`."""
        try:
            for event in self._received:
                self._on_event(event)
            while True:
                self._receive(0.0 if self._todo else IDLE_TIMEOUT)
                if self._todo:
                    self._answer(self._todo.popleft())
        except ProtocolViolation as violation:
            _log.warning("peer broke the protocol", peer=self.peer, reason=violation.reason)
            with suppress(OSError):
                self._write(self._session.send_refusal(0, violation.code, violation.reason))
        except (OSError, PeerUnreachable) as error:
            _log.debug("bulk connection ended", peer=self.peer, reason=str(error))
        finally:
            self._end_turn()

    # --- requests -------------------------------------------------------------------------------------------------

    def _receive(self, wait: float) -> None:
        """Take what the client has sent; where that is nothing, wait so many seconds. Raises at the end of it all."""
        if not wait and not self._has_bytes():
            return
        deadline = time.monotonic() + wait
        while True:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.0))
            try:
                data = self._sock.recv(READ_SIZE)
            except (ssl.SSLWantReadError, TimeoutError) as error:
                if wait:
                    raise PeerUnreachable(f"asked for nothing for {wait:.0f} s") from error
                return
            for event in self._session.receive(data):
                self._on_event(event)
            if self._todo or not wait:
                return

    def _has_bytes(self) -> bool:
        """Whether anything has come. Asking OpenSSL costs an exception each time that it has not."""
        return bool(self._sock.pending() or self._readable.poll(0))

    def _on_event(self, event: Event) -> None:
        match event:
            case RequestReceived(message=GetChunks()):
                self._todo.append(event)
            case RequestReceived():
                self._todo.appendleft(event)
            case RequestCancelled(request_id):
                self._todo = deque(waiting for waiting in self._todo if waiting.request_id != request_id)
                self._unwanted |= self._answering & {request_id}
                self._write(self._session.send_refusal(request_id, RefusalCode.CANCELLED))
            case Closed():
                raise PeerUnreachable("closed the connection")
            case _:
                raise AssertionError(f"an open server session never gives {event}")

    def _answer(self, request: RequestReceived) -> None:
        request_id = request.request_id
        self._answering.add(request_id)
        try:
            for answer in self._ready(request):
                self._write(self._session.send_reply(request_id, answer.message, (answer.payload,), more=answer.more))
                self._uploads.sent(answer)
        except _Withdrawn:
            pass  # refused as CANCELLED already
        except Refusal as refusal:
            self._refuse(request_id, refusal)
        except LocalError:
            _log.exception("request failed", peer=self.peer, request=type(request.message).__name__)
            self._refuse(request_id, Refusal(RefusalCode.INTERNAL))
        finally:
            self._answering.discard(request_id)
            self._unwanted.discard(request_id)
            self._end_turn()

    def _ready(self, request: RequestReceived) -> Iterator[Answer]:
        """The answers to a request, each in the turn in which it is to be sent.

        The next one is read meanwhile, unless somebody waits for a turn: then the processor has enough to do.
        """
        coming = answers(self._shelf, request.message)
        ahead: Future[Answer] | None = None
        more = True
        while more:
            self._take_turn(request.request_id)
            answer = ahead.result() if ahead is not None else next(coming)
            more = answer.more
            ahead = self._readers.submit(next, coming) if more and not self._uploads.contended else None
            yield answer
            self._end_turn()
            if more:
                self._look_up(request.request_id)

    def _look_up(self, request_id: int) -> None:
        """Between two chunks of a request."""
        self._receive(0.0)
        while self._todo and not isinstance(self._todo[0].message, GetChunks):
            self._answer(self._todo.popleft())
        if request_id in self._unwanted:
            raise _Withdrawn

    def _refuse(self, request_id: int, refusal: Refusal) -> None:
        refused = self._session.send_refusal(request_id, refusal.code, refusal.detail, refusal.retry_after)
        self._write(refused)

    # --- turns and bytes ------------------------------------------------------------------------------------------

    def _take_turn(self, request_id: int) -> None:
        self._turn = turn = self._uploads.ask(self.peer)
        while True:
            with suppress(TimeoutError):
                turn.granted.result(timeout=_LOOK_EVERY)
                return
            self._receive(0.0)
            if request_id in self._unwanted:
                raise _Withdrawn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._uploads.end(self._turn)
            self._turn = None

    def _write(self, buffers: Buffers) -> None:
        """A whole frame. Raises TimeoutError where the client does not take it in time; our own pauses do not count."""
        left = WRITE_TIMEOUT
        for piece in self._pieces(buffers):
            self._pause(self._uploads.pay(len(piece)))
            started = time.monotonic()
            self._sock.settimeout(left)
            self._sock.sendall(piece)
            left = max(left - (time.monotonic() - started), 0.001)

    def _pieces(self, buffers: Buffers) -> Iterator[memoryview]:
        size = (1 << 30) if self._uploads.rate is None else PIECE
        for buffer in buffers:
            view = memoryview(buffer)
            for start in range(0, len(view), size):
                yield view[start : start + size]

    def _pause(self, seconds: float) -> None:
        if seconds and self._ending.wait(seconds):
            raise PeerUnreachable("the connection is being ended on this side")


def shut(sock: socket) -> None:
    """End a connection and wake the thread that uses it. Not `sock.shutdown`: `SSLSocket` would go on in the clear."""
    with suppress(OSError):  # it ended already
        socket.shutdown(sock, SHUT_RDWR)
