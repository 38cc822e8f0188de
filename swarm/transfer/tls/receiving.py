"""The threads of a bulk connection: take frames off the wire, say whose they are, and hand chunks on.

Two threads take turns: one receives a chunk into its own buffer and hands it on (hashing, writing) while the other one
receives the next. So a chunk stays in the cache of one processor, and is never copied or queued.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moehive.protocol import limits
from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerError, PeerUnreachable
from moehive.protocol.frames import HEADER, Frame, Header, decode_header
from moehive.protocol.messages import Chunk
from moehive.protocol.session import ClientSession, Event, ReplyReceived, RequestRefused
from moehive.swarm.log import get_logger
from moehive.swarm.store.writing import aligned_buffer

from .delivery import ChunkRequest, Delivery, Step, settle
from .link import TlsLink

_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Question:
    """A request with one answer; `done` is settled on the event loop it belongs to."""

    done: asyncio.Future[tuple[Message, bytearray]]


class Receiver:
    """`run()` is each of the threads, which close the link at its end; the rest belongs on the event loop.

    `on_answered` is called there for every request that the peer has finished with.
    """

    def __init__(
        self,
        link: TlsLink,
        session: ClientSession,
        delivery: Delivery,
        loop: asyncio.AbstractEventLoop,
        on_answered: Callable[[], None],
    ) -> None:
        self.broken: PeerError | None = None
        self._link = link
        self._session = session
        self._delivery = delivery
        self._loop = loop
        self._on_answered = on_answered
        self._receiving = threading.Lock()  # the link
        self._lock = threading.Lock()  # of the session, and of what follows
        self._pending: dict[int, ChunkRequest | Question] = {}
        self._head = memoryview(bytearray(HEADER.size))

    # --- on the event loop ----------------------------------------------------------------------------------------

    def begin(self, message: Message, pending: ChunkRequest | Question) -> int:
        """Send a request; its id. Raises PeerError where the connection is broken, or breaks."""
        with self._lock:
            if self.broken is not None:
                raise self.broken.afresh()
            request_id, buffers = self._session.send_request(message)
            self._pending[request_id] = pending
        self._send(b"".join(buffers))
        return request_id

    def withdraw(self, request_id: int) -> None:
        """Tell the peer that its answer is not wanted any more, if it has not finished yet."""
        with self._lock:
            buffers = self._session.send_cancel(request_id) if self.broken is None else ()
        if buffers:
            with suppress(PeerUnreachable):
                self._send(b"".join(buffers))

    def _send(self, data: bytes) -> None:
        try:
            self._link.send(data)
        except PeerUnreachable:
            self._link.shut()  # the thread notices, and fails everything else
            raise

    # --- the threads ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the connection ends or the peer breaks the protocol."""
        buffer = aligned_buffer(CHUNK_SIZE)  # so that a store writes it without a copy
        while True:
            with self._receiving:
                if self.broken is not None:
                    return
                step = self._receive(buffer)
                if step is not None:
                    self._delivery.enter()  # before the next one may receive, and come in between
            if step is not None:
                self._delivery.carry_out(step)

    def _receive(self, buffer: memoryview) -> Step | None:
        """Take one frame; what is to be carried out of it. The end of everything is carried out here."""
        try:
            return self._take_frame(buffer)
        except PeerError as error:
            self._fail(error)
        except Exception:  # noqa: BLE001 - supervision point: whoever waits must learn that nothing more comes
            _log.exception("bulk connection failed: a bug", peer=self._link.peer)
            self._fail(PeerUnreachable("given up after an error on this side", peer=self._link.peer))
        return None

    def _take_frame(self, buffer: memoryview) -> Step | None:
        self._link.receive_into(self._head)
        header = decode_header(self._head, self._session.max_payload)
        meta = bytearray(header.meta_size)
        self._link.receive_into(memoryview(meta))
        if header.kind == Chunk.KIND:
            data = buffer[: header.payload_size]
            self._link.receive_into(data)
            [event] = self._events(header, bytes(meta), bytearray())
            assert isinstance(event, ReplyReceived)
            return self._on_chunk(event, data)
        payload = bytearray(header.payload_size)
        self._link.receive_into(memoryview(payload))
        [event] = self._events(header, bytes(meta), payload)
        return self._on_event(event)

    def _events(self, header: Header, meta: bytes, payload: bytearray) -> Sequence[Event]:
        with self._lock:
            return self._session.receive_frame(Frame(header.kind, header.request_id, header.flags, meta, payload))

    def _on_chunk(self, event: ReplyReceived, data: memoryview) -> Step:
        request = self._pending[event.request_id]
        assert isinstance(event.message, Chunk)
        assert isinstance(request, ChunkRequest)
        request.expected.accept(event.message, more=event.more, peer=self._link.peer)
        if not event.more:  # not before: a request that ends in a violation must be found among those that fail
            self._ended(event.request_id)
        request.moved = time.monotonic()
        return Step(request, event.message.index, data, end=not event.more)

    def _on_event(self, event: Event) -> Step | None:
        match event:
            case ReplyReceived(request_id, message, payload):
                question = self._ended(request_id)
                assert isinstance(question, Question)
                self._call(settle, question.done, (message, payload), None)
            case RequestRefused(0, error):  # the whole connection
                raise error.afresh()  # this frame holds `event`
            case RequestRefused(request_id, error):
                pending = self._ended(request_id)
                if isinstance(pending, ChunkRequest):
                    return Step(pending, error=error)
                self._call(settle, pending.done, None, error)
            case _:
                raise AssertionError(f"an open client session never gives {event}")
        return None

    def _ended(self, request_id: int) -> ChunkRequest | Question:
        """The request that the peer has just finished with."""
        self._call(self._on_answered)
        with self._lock:
            return self._pending.pop(request_id)

    def _fail(self, error: PeerError) -> None:
        """The thread that receives: end what is pending, after what is still being delivered, and close the link."""
        error.peer = error.peer or self._link.peer
        with self._lock:
            self.broken = error.afresh()  # whose traceback would hold us, and the buffers of the threads
            pending, self._pending = self._pending, {}
        self._link.shut()
        self._link.close()
        for each in pending.values():
            if isinstance(each, ChunkRequest):
                self._delivery.enter()
                self._delivery.carry_out(Step(each, error=error.afresh()))
            else:
                self._call(settle, each.done, None, error.afresh())
        for _ in range(limits.MAX_REQUESTS_IN_FLIGHT):  # whoever waits for a turn learns that there will be none
            self._call(self._on_answered)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)
