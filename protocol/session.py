"""One stream, seen from one end: the state machine of every protocol, without I/O.

    client:  HELLO_SENT --welcome--> OPEN --reply, refusal--> OPEN --refusal of the stream--> CLOSED
    server:  AWAIT_HELLO --hello--> OPEN --request, cancel--> OPEN

What is not in the table is a violation and closes the session, so a hostile peer finds no unwritten path. Bytes go in
through `receive`, which returns events; every `send_*` method returns the buffers to write, in order.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from . import limits
from .codec import Message, decode, encode
from .errors import PeerRefused, PeerUnreachable, ProtocolViolation, RefusalCode
from .frames import FLAG_MORE, Frame, FrameDecoder, encode_header
from .ids import PeerId
from .messages import Cancel, Hello, ProtocolSpec, Refused, Welcome
from .proofs import Proofs

Buffer = bytes | bytearray | memoryview
Buffers = Sequence[Buffer]


class State(enum.Enum):
    """Where a session stands."""

    AWAIT_HELLO = "await hello"
    HELLO_SENT = "hello sent"
    OPEN = "open"
    CLOSED = "closed"


class Input(enum.Enum):
    """What can arrive."""

    HELLO = "hello"
    WELCOME = "welcome"
    REFUSED = "refusal of a request"
    STREAM_REFUSED = "refusal of the stream"
    CANCEL = "cancel"
    REQUEST = "request"
    REPLY = "reply"
    END = "end of stream"


# (state, input) -> next state, for the end that serves and the end that asks.
SERVER_TABLE = {
    (State.AWAIT_HELLO, Input.HELLO): State.OPEN,
    (State.AWAIT_HELLO, Input.END): State.CLOSED,
    (State.OPEN, Input.REQUEST): State.OPEN,
    (State.OPEN, Input.CANCEL): State.OPEN,
    (State.OPEN, Input.END): State.CLOSED,
}
CLIENT_TABLE = {
    (State.HELLO_SENT, Input.WELCOME): State.OPEN,
    (State.HELLO_SENT, Input.STREAM_REFUSED): State.CLOSED,
    (State.HELLO_SENT, Input.END): State.CLOSED,
    (State.OPEN, Input.REPLY): State.OPEN,
    (State.OPEN, Input.REFUSED): State.OPEN,
    (State.OPEN, Input.STREAM_REFUSED): State.CLOSED,
    (State.OPEN, Input.END): State.CLOSED,
}


# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The other side has proved that it belongs to the swarm."""

    agent: str


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """Somebody asks (server)."""

    request_id: int
    message: Message
    payload: bytearray


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Somebody does not want the answer any more (server): refuse it as CANCELLED. No event where it was answered."""

    request_id: int


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """An answer (client); `more` answers to the same request follow."""

    request_id: int
    message: Message
    payload: bytearray
    more: bool


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """A request was refused (client); request id 0 is the whole stream, which is over then."""

    request_id: int
    error: PeerRefused


@dataclass(frozen=True, slots=True)
class Closed:
    """The other side ended the stream."""


Event = Opened | RequestReceived | RequestCancelled | ReplyReceived | RequestRefused | Closed


# --- sessions -----------------------------------------------------------------------------------------------------


class _Session(ABC):
    """What both ends share: decoding, the table, and the errors."""

    def __init__(
        self,
        spec: ProtocolSpec,
        admission: Proofs,
        agent: str,
        table: dict[tuple[State, Input], State],
        start: State,
        max_payload: int,
    ) -> None:
        self.spec = spec
        self.state = start
        self._admission = admission
        self._agent = agent
        self._table = table
        self._max_payload = max_payload
        self._decoder = FrameDecoder(max_payload=0)  # nobody is given memory for a payload before the proof

    @property
    def peer(self) -> PeerId:
        """The other end."""
        return self._admission.remote

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun to arrive and is not complete."""
        return self._decoder.mid_frame

    @property
    def buffered(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return self._decoder.buffered

    @property
    def max_payload(self) -> int:
        """What the next frame may carry, in bytes."""
        return self._decoder.max_payload

    def receive(self, data: bytes) -> list[Event]:
        """Take received bytes (b"" is the end of the stream).

        Raises ProtocolViolation, naming the peer, and PeerUnreachable where the stream ended inside a frame (a lost
        connection, nobody's lie). Either way the session is closed, as after a refusal of the stream: nothing more may
        be fed. Events of the portion that broke the protocol are not delivered.
        """
        assert self.state is not State.CLOSED, "received something after the session closed"
        try:
            return self._receive_frames(data) if data else [self._end()]
        except ProtocolViolation as error:
            raise self._blamed(error) from error.__cause__

    def receive_frame(self, frame: Frame) -> Sequence[Event]:
        """`receive` for whoever reads frames itself (see `decode_header`), and may keep a reply's payload back."""
        assert not self._decoder.mid_frame
        assert self.state is not State.CLOSED, "received something after the session closed"
        try:
            return self._on_frame(frame)
        except ProtocolViolation as error:
            raise self._blamed(error) from error.__cause__

    def _blamed(self, error: ProtocolViolation) -> ProtocolViolation:
        """The error, with the session closed for it."""
        self.state = State.CLOSED
        error.peer = error.peer or self.peer
        return error

    def _receive_frames(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for frame in self._decoder.feed(data):
            events += self._on_frame(frame)
            if self.state is State.CLOSED:  # the stream was refused; what was on its way behind that does not count
                break
        return events

    def _end(self) -> Event:
        self._advance(Input.END)
        if self._decoder.mid_frame:
            raise PeerUnreachable("the stream ended inside a frame", peer=self.peer)
        return Closed()

    def _advance(self, event: Input) -> None:
        if (self.state, event) not in self._table:
            raise ProtocolViolation(f"unexpected {event.value} in state {self.state.value!r}")
        self.state = self._table[self.state, event]

    @abstractmethod
    def _on_frame(self, frame: Frame) -> Sequence[Event]:
        """The events of one frame. Raises ProtocolViolation."""

    def _admit(self, frame: Frame, proof: bytes) -> None:
        if frame.request_id:
            raise ProtocolViolation("a greeting with a request id")
        self._admission.check(self.spec.name, proof)
        self._decoder.max_payload = self._max_payload

    @staticmethod
    def _bare(frame: Frame) -> None:
        if frame.payload or frame.flags:
            raise ProtocolViolation("a payload or flags where none belong")

    def _frame(
        self, request_id: int, message: Message, payload: Sequence[Buffer] = (), *, more: bool = False
    ) -> Buffers:
        meta = encode(message)
        size = sum(memoryview(part).nbytes for part in payload)
        header = encode_header(message.KIND, request_id, FLAG_MORE if more else 0, len(meta), size)
        return (header + meta, *payload)


@dataclass(slots=True)
class _Awaited:
    kind: type[Message]
    left: int  # replies that may still come


class ClientSession(_Session):
    """The end that opened the stream."""

    def __init__(self, spec: ProtocolSpec, admission: Proofs, agent: str) -> None:
        super().__init__(spec, admission, agent, CLIENT_TABLE, State.HELLO_SENT, spec.max_reply_payload)
        self._last_id = 0
        self._expected: dict[int, _Awaited] = {}

    @property
    def in_flight(self) -> int:
        """Requests without a final answer, cancelled ones included until they are answered."""
        return len(self._expected)

    def send_hello(self) -> Buffers:
        """The first frame."""
        return self._frame(0, Hello(agent=self._agent, proof=self._admission.own_proof(self.spec.name)))

    def send_request(self, message: Message, payload: Sequence[Buffer] = ()) -> tuple[int, Buffers]:
        """A new request: its id, and what to write. Only in state OPEN, with fewer than the limit in flight."""
        assert self.state is State.OPEN, self.state
        assert self.in_flight < limits.MAX_REQUESTS_IN_FLIGHT, self.in_flight
        request_id = self._new_id()
        self._expected[request_id] = _Awaited(self.spec.answers[type(message)], message.max_replies)
        return request_id, self._frame(request_id, message, payload)

    def _new_id(self) -> int:
        while True:
            self._last_id = self._last_id % 0xFFFFFFFF + 1  # 0 stands for the stream
            if self._last_id not in self._expected:
                return self._last_id

    def send_cancel(self, request_id: int) -> Buffers:
        """Withdraw a request. It still ends with an answer (which may be on its way) or with the refusal CANCELLED."""
        return self._frame(request_id, Cancel()) if request_id in self._expected else ()

    def _on_frame(self, frame: Frame) -> Sequence[Event]:
        if frame.kind == Welcome.KIND:
            self._advance(Input.WELCOME)
            self._bare(frame)
            welcome = decode(Welcome, frame.meta)
            self._admit(frame, welcome.proof)
            return [Opened(welcome.agent)]
        if frame.kind == Refused.KIND:
            return [self._on_refused(frame)]
        self._advance(Input.REPLY)
        return [self._on_reply(frame)]

    def _on_reply(self, frame: Frame) -> Event:
        awaited = self._expected.get(frame.request_id)
        if awaited is None or frame.kind != awaited.kind.KIND:
            raise ProtocolViolation(f"reply of kind {frame.kind} to request {frame.request_id} was not asked for")
        more = bool(frame.flags & FLAG_MORE)
        awaited.left -= 1
        if more and not awaited.left:
            raise ProtocolViolation(f"more replies to request {frame.request_id} than it asked for")
        if not more:
            del self._expected[frame.request_id]
        return ReplyReceived(frame.request_id, decode(awaited.kind, frame.meta), frame.payload, more)

    def _on_refused(self, frame: Frame) -> Event:
        self._advance(Input.REFUSED if frame.request_id else Input.STREAM_REFUSED)
        self._bare(frame)
        refused = decode(Refused, frame.meta)
        if frame.request_id and self._expected.pop(frame.request_id, None) is None:
            raise ProtocolViolation(f"refusal of request {frame.request_id}, which was not asked")
        code = RefusalCode(refused.code) if refused.code in RefusalCode.__members__.values() else RefusalCode.INTERNAL
        error = PeerRefused(code, refused.detail, retry_after=refused.retry_after, peer=self.peer)
        return RequestRefused(frame.request_id, error)


class ServerSession(_Session):
    """The end that was called."""

    def __init__(self, spec: ProtocolSpec, admission: Proofs, agent: str) -> None:
        super().__init__(spec, admission, agent, SERVER_TABLE, State.AWAIT_HELLO, spec.max_request_payload)
        self._kinds = {kind.KIND: kind for kind in spec.answers}
        self._open: set[int] = set()

    def send_welcome(self) -> Buffers:
        """The answer to Hello: after the `Opened` event."""
        assert self.state is State.OPEN, self.state
        return self._frame(0, Welcome(agent=self._agent, proof=self._admission.own_proof(self.spec.name)))

    def send_reply(self, request_id: int, message: Message, payload: Buffers = (), *, more: bool = False) -> Buffers:
        """An answer; with `more`, further ones follow. Nothing for a request that is over."""
        if request_id not in self._open:
            return ()
        if not more:
            self._open.discard(request_id)
        return self._frame(request_id, message, payload, more=more)

    def send_refusal(self, request_id: int, code: RefusalCode, detail: str = "", retry_after: float = 0.0) -> Buffers:
        """A refusal of one request, or with id 0 of the stream (also after a violation)."""
        if request_id and request_id not in self._open:
            return ()
        self._open.discard(request_id)
        retry_after = min(max(retry_after, 0.0), limits.MAX_DEADLINE)
        detail = "".join(char if char.isprintable() else " " for char in detail[: limits.MAX_DETAIL_CHARS])
        return self._frame(request_id, Refused(code=int(code), detail=detail, retry_after=retry_after))

    def _on_frame(self, frame: Frame) -> Sequence[Event]:
        if frame.flags:
            raise ProtocolViolation("flags on a request")
        if frame.kind == Cancel.KIND:
            return self._on_cancel(frame)
        return [self._on_hello(frame) if frame.kind == Hello.KIND else self._on_request(frame)]

    def _on_hello(self, frame: Frame) -> Event:
        self._advance(Input.HELLO)
        self._bare(frame)
        hello = decode(Hello, frame.meta)
        self._admit(frame, hello.proof)
        return Opened(hello.agent)

    def _on_cancel(self, frame: Frame) -> Sequence[Event]:
        self._advance(Input.CANCEL)
        self._bare(frame)
        decode(Cancel, frame.meta)
        return [RequestCancelled(frame.request_id)] if frame.request_id in self._open else []

    def _on_request(self, frame: Frame) -> Event:
        self._advance(Input.REQUEST)
        kind = self._kinds.get(frame.kind)
        if kind is None:
            raise ProtocolViolation(f"unknown request kind {frame.kind}")
        if frame.request_id == 0 or frame.request_id in self._open:
            raise ProtocolViolation(f"request id {frame.request_id} is in use")
        if len(self._open) >= limits.MAX_REQUESTS_IN_FLIGHT:
            raise ProtocolViolation(f"more than {limits.MAX_REQUESTS_IN_FLIGHT} requests in flight")
        self._open.add(frame.request_id)
        return RequestReceived(frame.request_id, decode(kind, frame.meta), frame.payload)
