"""The answering end of one stream: hello, then requests, each in a task of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import LocalError, PeerError, PeerUnreachable, ProtocolViolation, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import ProtocolSpec
from moehive.protocol.proofs import Admission
from moehive.protocol.session import (
    Buffer,
    Buffers,
    Closed,
    Event,
    Opened,
    RequestCancelled,
    RequestReceived,
    ServerSession,
    State,
)
from moehive.swarm.log import get_logger
from moehive.swarm.transport.base import Handler, Stream

READ_SIZE = 256 << 10
FRAME_TIMEOUT = 60.0  # seconds in which a frame that has begun must be complete, in either direction (slow-loris)
BUSY_PAUSE = 1.0  # seconds that a peer is asked to stay away
_log = get_logger(__name__)


class Refusal(Exception):
    """Raised by a request handler to say no; not an error of anybody's."""

    def __init__(self, code: RefusalCode, detail: str = "", *, retry_after: float = 0.0) -> None:
        super().__init__(detail or code.name)
        self.code = code
        self.detail = detail
        self.retry_after = retry_after  # seconds


class Inbox:
    """Bytes of frames that are arriving, over all streams of a node: bounds what peers together can make it hold."""

    def __init__(self, limit: int = limits.MAX_ARRIVING_BYTES) -> None:
        self._limit = limit
        self._held: dict[int, int] = {}  # by stream

    def holds(self, stream: int, size: int) -> bool:
        """Whether a stream's unfinished frame, now of `size` bytes, still fits; a lone small one always does."""
        self._held.pop(stream, None)
        if size:
            if size > limits.ALWAYS_TAKEN_BYTES and sum(self._held.values()) + size > self._limit:
                return False
            self._held[stream] = size
        return True


Reply = Callable[..., Awaitable[None]]  # reply(message, payload=(), more=False)


class RequestHandler(Protocol):
    """Answers one request by calling `reply` once, or several times with more=True before the last."""

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Raises Refusal to say no."""


# Why a request that has just arrived is not even begun, told at once; None to let the handler decide.
Gate = Callable[[PeerId, Message, int], Refusal | None]  # (peer, message, bytes of the payload)


def open_gate(peer: PeerId, message: Message, payload_bytes: int) -> None:
    """Lets everything through."""


def stream_handler(
    spec: ProtocolSpec,
    secret: bytes,
    local: PeerId,
    agent: str,
    handle: RequestHandler,
    inbox: Inbox | None = None,
    gate: Gate = open_gate,
) -> Handler:
    """What `Transport.serve` wants: one protocol of ours on every stream that others open.

    Handlers that are given the same `inbox` share its bound.
    """
    shared = inbox or Inbox()

    async def on_stream(stream: Stream) -> None:
        admission = Admission(secret, local, stream.peer)
        await ServedStream(stream, ServerSession(spec, admission, agent), handle, inbox=shared, gate=gate).run()

    return on_stream


class ServedStream:
    """One stream at work. `admit` may turn a peer away that has proved to be a member.

    Where `answers_strangers` is false, who has not proved it is not told anything.
    """

    def __init__(
        self,
        stream: Stream,
        session: ServerSession,
        handle: RequestHandler,
        *,
        inbox: Inbox,
        gate: Gate = open_gate,
        admit: Callable[[PeerId], bool] = lambda peer: True,
        answers_strangers: bool = True,
    ) -> None:
        self._inbox = inbox
        self._gate = gate
        self._admit = admit
        self._answers = answers_strangers  # from Opened on everybody is answered
        self._stream = stream
        self._session = session
        self._handle = handle
        self._replying: set[int] = set()  # requests whose answer is being written
        self._unwanted: set[int] = set()  # those of them that were cancelled meanwhile
        self._refused: list[Buffer] = []  # what the gate says to the requests that arrived together
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Serve until the other side closes, breaks the protocol, or we are cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    await self._serve(group)
                finally:
                    self._inbox.holds(id(self), 0)
                for task in self._tasks.values():
                    task.cancel()  # nobody is left to read the answers
        except* PeerUnreachable as broken:
            _log.debug("stream broke", peer=self._session.peer, reason=str(broken.exceptions[0]))

    async def _serve(self, group: asyncio.TaskGroup) -> None:
        clock = asyncio.get_running_loop().time
        deadline: float | None = clock() + limits.HELLO_TIMEOUT
        while self._session.state is not State.CLOSED:
            try:
                async with asyncio.timeout_at(deadline):
                    data = await self._stream.read(READ_SIZE)
                events = self._session.receive(data)
            except TimeoutError:
                _log.info("stream dropped: too slow", peer=self._session.peer)
                return
            except ProtocolViolation as violation:
                await self._refuse_stream(violation)
                return
            for event in events:
                await self._on_event(event, group)
            refused, self._refused = self._refused, []
            await self._write(refused)
            if not self._inbox.holds(id(self), self._session.buffered):
                _log.warning("stream dropped: too much is arriving at the same time", peer=self._session.peer)
                await self._refuse(0, RefusalCode.BUSY, "too much is arriving", BUSY_PAUSE)
                return
            if not self._session.mid_frame:
                deadline = None if self._session.state is State.OPEN else deadline
            elif events or deadline is None:  # another frame than before: one that trickles in gets no new deadline
                deadline = clock() + FRAME_TIMEOUT

    async def _refuse_stream(self, violation: ProtocolViolation) -> None:
        _log.warning("peer broke the protocol", peer=self._session.peer, reason=violation.reason)
        if not self._answers:
            return
        detail = "" if violation.code is RefusalCode.NOT_ADMITTED else violation.reason
        await self._write(self._session.send_refusal(0, violation.code, detail))

    async def _on_event(self, event: Event, group: asyncio.TaskGroup) -> None:
        match event:
            case Opened() if not self._admit(self._session.peer):
                raise PeerUnreachable("has too many connections already", peer=self._session.peer)
            case Opened():
                self._answers = True
                await self._write(self._session.send_welcome())
            case RequestReceived(request_id, message, payload) if refusal := self._gate(
                self._session.peer, message, len(payload)
            ):
                code, detail, retry_after = refusal.code, refusal.detail, refusal.retry_after
                self._refused += self._session.send_refusal(request_id, code, detail, retry_after)
            case RequestReceived(request_id, message, payload):
                answering = group.create_task(self._answer(request_id, message, payload))
                self._tasks[request_id] = answering
                answering.add_done_callback(partial(self._forget, request_id))
            case RequestCancelled(request_id) if request_id in self._replying:
                self._unwanted.add(request_id)  # a write that is cut off would break the stream for everybody
            case RequestCancelled(request_id):
                if task := self._tasks.get(request_id):  # else: it ended while earlier events were handled
                    task.cancel()
                await self._write(self._session.send_refusal(request_id, RefusalCode.CANCELLED))
            case Closed():
                pass
            case _:
                raise AssertionError(f"a server session never gives {event}")

    async def _answer(self, request_id: int, message: Message, payload: bytearray) -> None:
        async def reply(answer: Message, body: Buffers = (), *, more: bool = False) -> None:
            self._replying.add(request_id)
            try:
                await self._write(self._session.send_reply(request_id, answer, body, more=more))
            finally:
                self._replying.discard(request_id)
            if request_id in self._unwanted:
                raise Refusal(RefusalCode.CANCELLED)

        try:
            await self._handle(self._session.peer, message, payload, reply)
        except Refusal as refusal:
            await self._refuse(request_id, refusal.code, refusal.detail, refusal.retry_after)
        except PeerUnreachable:
            raise
        except PeerError as error:  # the request itself is bad
            await self._refuse(request_id, RefusalCode.BAD_REQUEST, error.reason)
        except LocalError:
            _log.exception("request failed", peer=self._session.peer, request=type(message).__name__)
            await self._refuse(request_id, RefusalCode.INTERNAL)
        except Exception:  # noqa: BLE001 - supervision point: one request's bug must not end the others
            _log.exception("request failed: a bug", peer=self._session.peer, request=type(message).__name__)
            await self._refuse(request_id, RefusalCode.INTERNAL)

    def _forget(self, request_id: int, task: asyncio.Task[None]) -> None:
        """A callback, because a task that is cancelled before it begins runs no code of its own."""
        if self._tasks.get(request_id) is task:  # else: the id is in use again
            del self._tasks[request_id]
            self._unwanted.discard(request_id)

    async def _refuse(self, request_id: int, code: RefusalCode, detail: str = "", retry_after: float = 0.0) -> None:
        await self._write(self._session.send_refusal(request_id, code, detail, retry_after))

    async def _write(self, buffers: Buffers) -> None:
        if not buffers:
            return
        try:
            async with asyncio.timeout(FRAME_TIMEOUT):  # who asks and does not read would hold memory and upload slots
                await self._stream.write(*buffers)
        except TimeoutError as error:
            raise PeerUnreachable("does not read what it asked for", peer=self._session.peer) from error
