"""The asking end of one stream: requests pipelined by id, answers in any order, a deadline on each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerError, PeerTimeout, PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import ProtocolSpec
from moehive.protocol.session import Buffers, ClientSession, Event, Opened, ReplyReceived, RequestRefused
from moehive.swarm.transport.base import Stream

READ_SIZE = 256 << 10
CANCEL_TIMEOUT = 1.0  # seconds to send a cancellation; a peer that does not even take that is given up


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply; `more` replies to the same request follow."""

    message: Message
    payload: bytearray
    more: bool


@dataclass(slots=True)
class _Request:
    """One request that may not be answered yet."""

    id: int
    unsent: Buffers
    answers: asyncio.Queue[Answer | PeerError]
    deadline: float  # of the next answer
    timeout: float


class Connection:
    """One stream to one peer, shared by all requests to it. An async context manager; entering says hello.

    When the stream breaks or the peer breaks the protocol, every waiting request fails with that error and `broken`
    holds it; a broken connection is replaced, not repaired.
    """

    def __init__(self, stream: Stream, session: ClientSession) -> None:
        self._stream = stream
        self._session = session
        self._slots = asyncio.Semaphore(limits.MAX_REQUESTS_IN_FLIGHT)
        self._waiting: dict[int, asyncio.Queue[Answer | PeerError]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.broken: PeerError | None = None
        self.agent = ""

    @property
    def peer(self) -> PeerId:
        """The other end."""
        return self._session.peer

    @property
    def spec(self) -> ProtocolSpec:
        """The protocol spoken."""
        return self._session.spec

    @property
    def in_flight(self) -> int:
        """Requests without a final answer."""
        return len(self._waiting)

    async def drained(self) -> None:
        """Return when no request waits for an answer."""
        await self._idle.wait()

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(limits.HELLO_TIMEOUT):
                await self._stream.write(*self._session.send_hello())
                await self._open()
        except TimeoutError as error:
            await self._stream.close()
            raise PeerTimeout(f"no welcome within {limits.HELLO_TIMEOUT:.0f} s", peer=self.peer) from error
        except BaseException:
            await self._stream.close()
            raise
        self._reader = asyncio.create_task(self._read(), name=f"read {self.peer}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fail what is waiting, and close the stream. Never raises, may be called twice."""
        self._fail(PeerUnreachable("connection closed", peer=self.peer))
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._stream.close()

    async def ask(self, message: Message, payload: Buffers = (), *, timeout: float) -> Answer:
        """One request, one answer. Raises PeerError; PeerTimeout after `timeout` seconds, the request cancelled.

        The deadline holds for all of it: waiting for a turn, sending, waiting for the answer.
        """
        request = await self._begin(message, payload, timeout)
        try:
            return await self._next(request)
        finally:
            await self._end(request)

    async def ask_many(
        self, message: Message, payload: Buffers = (), *, timeout: float
    ) -> AsyncGenerator[Answer, None]:
        """One request, several answers; `timeout` seconds until the first and between them. Raises PeerError.

        Close it (`contextlib.aclosing`) where it is not read to its end: that cancels the request.
        """
        request = await self._begin(message, payload, timeout)
        try:
            more = True
            while more:
                answer = await self._next(request)
                more = answer.more
                yield answer
                request.deadline = asyncio.get_running_loop().time() + timeout
        finally:
            await self._end(request)

    async def _begin(self, message: Message, payload: Buffers, timeout: float) -> _Request:
        """A place among the requests in flight; it is sent by the first `_next`, and must be ended."""
        deadline = asyncio.get_running_loop().time() + timeout
        await self._take_slot(timeout)  # given back in `_deliver`: a cancelled request counts until the peer confirms
        if self.broken is not None:
            self._slots.release()
            raise self.broken.afresh()
        request_id, buffers = self._session.send_request(message, payload)
        queue = self._waiting[request_id] = asyncio.Queue()
        self._idle.clear()
        return _Request(request_id, buffers, queue, deadline, timeout)

    async def _next(self, request: _Request) -> Answer:
        try:
            async with asyncio.timeout_at(request.deadline):
                unsent, request.unsent = request.unsent, ()
                await self._write(unsent)
                answer = await request.answers.get()
        except TimeoutError as error:
            raise PeerTimeout(f"no answer within {request.timeout:.1f} s", peer=self.peer) from error
        if isinstance(answer, PeerError):
            raise answer.afresh()  # this frame holds `answer`
        return answer

    async def _end(self, request: _Request) -> None:
        """Withdraw it where it is not answered to its end."""
        unanswered = self._waiting.pop(request.id, None) is not None
        if not self._waiting:
            self._idle.set()
        if unanswered and self.broken is None:
            await self._cancel(request.id)

    async def _cancel(self, request_id: int) -> None:
        with suppress(TimeoutError, PeerUnreachable):  # then the connection is broken, which is all that can be said
            async with asyncio.timeout(CANCEL_TIMEOUT):
                await self._write(self._session.send_cancel(request_id))

    async def _take_slot(self, timeout: float) -> None:
        if not self._slots.locked():
            await self._slots.acquire()  # at once
            return
        try:
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
        except TimeoutError as error:
            reason = f"{limits.MAX_REQUESTS_IN_FLIGHT} requests are unanswered after {timeout:.1f} s"
            raise PeerTimeout(reason, peer=self.peer) from error

    async def _write(self, buffers: Buffers) -> None:
        if not buffers:
            return
        try:
            await self._stream.write(*buffers)
        except asyncio.CancelledError:  # a deadline too: half a frame may be out
            self._fail(PeerUnreachable("a request was given up while it was being sent", peer=self.peer))
            raise

    async def _open(self) -> None:
        while not self.agent:
            for event in self._session.receive(await self._stream.read(READ_SIZE)):
                if isinstance(event, RequestRefused):
                    raise event.error.afresh()  # this frame holds `event`
                if not isinstance(event, Opened):
                    raise PeerUnreachable("closed the stream before saying hello", peer=self.peer)
                self.agent = event.agent or "?"

    async def _read(self) -> None:
        try:
            while self.broken is None:
                for event in self._session.receive(await self._stream.read(READ_SIZE)):
                    self._on_event(event)
        except PeerError as error:
            self._fail(error)
        await self._stream.close()  # now: the pool replaces a broken connection only when it is asked for again

    def _on_event(self, event: Event) -> None:
        match event:
            case ReplyReceived(request_id, message, payload, more):
                self._deliver(request_id, Answer(message, payload, more), final=not more)
            case RequestRefused(0, error):  # the whole stream
                self._fail(error)
            case RequestRefused(request_id, error):
                self._deliver(request_id, error, final=True)
            case _:
                self._fail(PeerUnreachable("the peer closed the connection", peer=self.peer))

    def _deliver(self, request_id: int, answer: Answer | PeerError, *, final: bool) -> None:
        if final:
            self._slots.release()
        queue = self._waiting.pop(request_id, None) if final else self._waiting.get(request_id)
        if queue is not None:  # else: nobody waits any more, the answer crossed the cancellation
            queue.put_nowait(answer)

    def _fail(self, error: PeerError) -> None:
        if self.broken is None:
            self.broken = error.afresh()  # whose traceback would hold us
            for _ in range(limits.MAX_REQUESTS_IN_FLIGHT):
                self._slots.release()  # whoever waits for a turn learns that there will be none
        waiting, self._waiting = self._waiting, {}
        for queue in waiting.values():
            queue.put_nowait(error)
