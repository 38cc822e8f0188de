"""Sessions: every state with every input, and two ends in conversation."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.session_ends import (
    CHUNKS,
    CLIENT,
    LIST,
    LOAD,
    SERVER,
    Session,
    asked,
    asked_of,
    client,
    hello_bytes,
    joined,
    message_bytes,
    refused_bytes,
    server,
    violates,
    welcome_bytes,
)
from support.wire import any_message, portions, raw_frame

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import (
    PeerUnreachable,
    ProtocolViolation,
    RefusalCode,
)
from moehive.protocol.frames import FLAG_MORE
from moehive.protocol.messages import (
    PEER,
    SHARD,
    Cancel,
    Chunk,
    ChunkHashes,
    GetLoad,
    ProtocolSpec,
)
from moehive.protocol.session import (
    CLIENT_TABLE,
    SERVER_TABLE,
    Buffers,
    ClientSession,
    Closed,
    Event,
    Input,
    Opened,
    ReplyReceived,
    RequestCancelled,
    RequestReceived,
    RequestRefused,
    ServerSession,
    State,
)

# --- every state, every input -------------------------------------------------------------------------------------

CLIENT_STATES: dict[State, Callable[[], ClientSession]] = {
    State.HELLO_SENT: lambda: client(opened=False),
    State.OPEN: lambda: asked(client()),
}
SERVER_STATES: dict[State, Callable[[], ServerSession]] = {
    State.AWAIT_HELLO: lambda: server(opened=False),
    State.OPEN: lambda: asked_of(server()),
}
INPUTS: dict[Input, bytes] = {
    Input.HELLO: hello_bytes(),
    Input.WELCOME: welcome_bytes(),
    Input.REFUSED: refused_bytes(1),
    Input.STREAM_REFUSED: refused_bytes(0),
    Input.CANCEL: message_bytes(Cancel(), 1),
    Input.REQUEST: message_bytes(GetLoad(), 2),
    Input.REPLY: message_bytes(LOAD, 1),
    Input.END: b"",
}


def test_inputs_are_complete() -> None:
    assert set(INPUTS) == set(Input)
    assert {*CLIENT_STATES, *SERVER_STATES, State.CLOSED} == set(State)


@pytest.mark.parametrize("event", Input)
@pytest.mark.parametrize("state", CLIENT_STATES)
def test_client_follows_its_table(state: State, event: Input) -> None:
    check_table(CLIENT_STATES[state](), CLIENT_TABLE, event)


@pytest.mark.parametrize("event", Input)
@pytest.mark.parametrize("state", SERVER_STATES)
def test_server_follows_its_table(state: State, event: Input) -> None:
    check_table(SERVER_STATES[state](), SERVER_TABLE, event)


def check_table(session: Session, table: dict[tuple[State, Input], State], event: Input) -> None:
    expected = table.get((session.state, event))
    if expected is None:
        violates(session, INPUTS[event])
    else:
        assert len(session.receive(INPUTS[event])) == 1
        assert session.state is expected


# The tables as the documentation draws them: a change of the code's table must be meant.
def test_the_tables_hold_nothing_else() -> None:
    assert {(s.name, i.name, n.name) for (s, i), n in CLIENT_TABLE.items()} == {
        ("HELLO_SENT", "WELCOME", "OPEN"),
        ("HELLO_SENT", "STREAM_REFUSED", "CLOSED"),
        ("HELLO_SENT", "END", "CLOSED"),
        ("OPEN", "REPLY", "OPEN"),
        ("OPEN", "REFUSED", "OPEN"),
        ("OPEN", "STREAM_REFUSED", "CLOSED"),
        ("OPEN", "END", "CLOSED"),
    }
    assert {(s.name, i.name, n.name) for (s, i), n in SERVER_TABLE.items()} == {
        ("AWAIT_HELLO", "HELLO", "OPEN"),
        ("AWAIT_HELLO", "END", "CLOSED"),
        ("OPEN", "REQUEST", "OPEN"),
        ("OPEN", "CANCEL", "OPEN"),
        ("OPEN", "END", "CLOSED"),
    }


any_bytes = st.one_of(
    st.sampled_from(sorted(INPUTS.values())),
    any_message.flatmap(
        lambda message: st.builds(
            message_bytes, st.just(message), st.integers(0, 2), st.binary(max_size=4), st.sampled_from([0, FLAG_MORE])
        )
    ),
    st.builds(raw_frame, st.integers(0, 255), st.binary(max_size=20), request_id=st.integers(0, 2)),
    st.binary(max_size=40),
)


@given(
    st.sampled_from([*CLIENT_STATES.values(), *SERVER_STATES.values()]),
    st.lists(any_bytes, max_size=4),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_whatever_arrives_the_session_stays_in_its_table(
    start: Callable[[], Session], arriving: list[bytes], cuts: list[int]
) -> None:
    session = start()
    for part in [*portions(b"".join(arriving), cuts), b""]:
        before = session.state
        try:
            session.receive(part)
        except (ProtocolViolation, PeerUnreachable):
            assert session.state is State.CLOSED
        if session.state is State.CLOSED:
            return
        assert session.state is before or before is not State.OPEN
    raise AssertionError("the end of the stream closes every session")


# --- two ends in conversation -------------------------------------------------------------------------------------


class Conversation:
    """A client and a server joined by two queues of bytes, delivered in whatever portions the test likes."""

    def __init__(self, spec: ProtocolSpec = PEER, cut: Callable[[bytes], list[bytes]] = lambda data: [data]) -> None:
        self.client, self.server = client(spec, opened=False), server(spec, opened=False)
        self.to_server, self.to_client = b"", b""
        self._cut = cut
        self.write(self.client.send_hello())
        assert self.at_server() == [Opened("client")]
        self.answer(self.server.send_welcome())
        assert self.at_client() == [Opened("server")]

    def write(self, buffers: Buffers) -> None:
        self.to_server += joined(buffers)

    def answer(self, buffers: Buffers) -> None:
        self.to_client += joined(buffers)

    def ask(self, message: Message) -> int:
        request_id, buffers = self.client.send_request(message)
        self.write(buffers)
        return request_id

    def at_server(self) -> list[Event]:
        data, self.to_server = self.to_server, b""
        return [event for part in self._cut(data) for event in self.server.receive(part)]

    def at_client(self) -> list[Event]:
        data, self.to_client = self.to_client, b""
        return [event for part in self._cut(data) for event in self.client.receive(part)]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def test_hello_says_who_and_admits_both() -> None:
    talk = Conversation()
    assert (talk.client.state, talk.server.state) == (State.OPEN, State.OPEN)
    assert (talk.client.peer, talk.server.peer) == (SERVER, CLIENT)


@given(st.integers(1, limits.MAX_REQUESTS_IN_FLIGHT), st.randoms(use_true_random=False), st.booleans())
def test_pipelined_requests_answered_in_any_order(count: int, shuffle: random.Random, trickled: bool) -> None:
    talk = Conversation(cut=single_bytes if trickled else lambda data: [data])
    ids = [talk.ask(GetLoad()) for _ in range(count)]
    assert talk.at_server() == [RequestReceived(i, GetLoad(), bytearray()) for i in ids]
    assert talk.client.in_flight == count
    shuffle.shuffle(ids)
    for i in ids:
        talk.answer(talk.server.send_reply(i, dataclasses.replace(LOAD, rows_done=i)))
    assert talk.at_client() == [
        ReplyReceived(i, dataclasses.replace(LOAD, rows_done=i), bytearray(), more=False) for i in ids
    ]
    assert talk.client.in_flight == 0


def test_replies_in_several_parts_interleave_with_others() -> None:
    talk = Conversation(SHARD)
    chunks, listing = talk.ask(CHUNKS), talk.ask(LIST)
    talk.at_server()
    talk.answer(talk.server.send_reply(chunks, Chunk(index=0), (b"a",), more=True))
    talk.answer(talk.server.send_reply(listing, ChunkHashes(size=3), (b"h" * 16, b"h" * 16)))
    talk.answer(talk.server.send_reply(chunks, Chunk(index=1), (b"b",), more=True))
    talk.answer(talk.server.send_reply(chunks, Chunk(index=2), (b"c",)))
    assert talk.at_client() == [
        ReplyReceived(chunks, Chunk(index=0), bytearray(b"a"), more=True),
        ReplyReceived(listing, ChunkHashes(size=3), bytearray(b"h" * 32), more=False),
        ReplyReceived(chunks, Chunk(index=1), bytearray(b"b"), more=True),
        ReplyReceived(chunks, Chunk(index=2), bytearray(b"c"), more=False),
    ]
    assert talk.client.in_flight == 0


def test_several_parts_may_end_early_or_with_a_refusal() -> None:
    talk = Conversation(SHARD)
    first, second = talk.ask(CHUNKS), talk.ask(CHUNKS)
    talk.at_server()
    talk.answer(talk.server.send_reply(first, Chunk(index=0)))
    talk.answer(talk.server.send_reply(second, Chunk(index=0), more=True))
    talk.answer(talk.server.send_refusal(second, RefusalCode.NOT_HELD))
    *_, last = talk.at_client()
    assert isinstance(last, RequestRefused)
    assert talk.client.in_flight == 0


def test_a_refusal_carries_its_reason() -> None:
    talk = Conversation()
    request = talk.ask(GetLoad())
    talk.at_server()
    talk.answer(talk.server.send_refusal(request, RefusalCode.BUSY, "queue full", retry_after=2.5))
    (event,) = talk.at_client()
    assert isinstance(event, RequestRefused)
    error = event.error
    assert (event.request_id, error.code, error.detail) == (request, RefusalCode.BUSY, "queue full")
    assert (error.retry_after, error.peer, error.retryable) == (2.5, SERVER, True)
    assert talk.client.state is State.OPEN


def test_what_a_refusal_says_is_made_to_fit() -> None:
    talk = Conversation()
    request = talk.ask(GetLoad())
    talk.at_server()
    talk.answer(talk.server.send_refusal(request, RefusalCode.BUSY, "a\n\x1b\udcff" + "x" * 999, retry_after=1e9))
    (event,) = talk.at_client()
    assert isinstance(event, RequestRefused)
    assert event.error.detail == "a   " + "x" * (limits.MAX_DETAIL_CHARS - 4)
    assert event.error.retry_after == limits.MAX_DEADLINE


@pytest.mark.parametrize("code", [0, 11, 255])
def test_an_unknown_refusal_code_is_read_as_internal(code: int) -> None:
    (event,) = asked(client()).receive(refused_bytes(1, code))
    assert isinstance(event, RequestRefused)
    assert event.error.code is RefusalCode.INTERNAL


@pytest.mark.parametrize("opened", [True, False])
def test_the_whole_stream_may_be_refused(opened: bool) -> None:
    session = client(opened=opened)
    (event,) = session.receive(refused_bytes(0) + raw_frame(99) + b"tail")
    assert isinstance(event, RequestRefused)
    assert event.request_id == 0
    assert session.state is State.CLOSED


def test_a_violation_is_told_to_the_client_that_committed_it() -> None:
    talk = Conversation()
    talk.ask(GetLoad())
    error = violates(talk.server, raw_frame(99))
    talk.answer(talk.server.send_refusal(0, error.code, error.reason))
    (event,) = talk.at_client()
    assert isinstance(event, RequestRefused)
    assert (event.request_id, event.error.code) == (0, RefusalCode.BAD_REQUEST)
    assert talk.client.state is State.CLOSED


def test_a_cancelled_request_ends_with_its_refusal() -> None:
    talk = Conversation()
    request = talk.ask(GetLoad())
    talk.write(talk.client.send_cancel(request))
    assert talk.at_server() == [RequestReceived(request, GetLoad(), bytearray()), RequestCancelled(request)]
    assert talk.client.in_flight == 1
    talk.answer(talk.server.send_refusal(request, RefusalCode.CANCELLED))
    (event,) = talk.at_client()
    assert isinstance(event, RequestRefused)
    assert event.error.code is RefusalCode.CANCELLED
    assert talk.client.in_flight == 0


def test_a_cancellation_that_crosses_the_reply_changes_nothing() -> None:
    talk = Conversation()
    request = talk.ask(GetLoad())
    talk.at_server()
    talk.answer(talk.server.send_reply(request, LOAD))
    talk.write(talk.client.send_cancel(request))
    assert talk.at_client() == [ReplyReceived(request, LOAD, bytearray(), more=False)]
    assert talk.at_server() == []
    assert talk.client.send_cancel(request) == ()
    assert talk.server.send_refusal(request, RefusalCode.CANCELLED) == ()
    assert talk.server.send_reply(request, LOAD) == ()
    assert (talk.client.state, talk.server.state) == (State.OPEN, State.OPEN)


def test_cancelling_what_was_never_asked_is_ignored() -> None:
    assert client().send_cancel(7) == ()
    assert server().receive(message_bytes(Cancel(), 7)) == []


def test_the_end_of_the_stream() -> None:
    talk = Conversation()
    talk.ask(GetLoad())
    assert talk.client.receive(b"") == [Closed()]
    assert talk.server.receive(b"") == [Closed()]
    assert (talk.client.state, talk.server.state) == (State.CLOSED, State.CLOSED)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40])
def test_the_end_inside_a_frame_is_a_lost_connection(size: int) -> None:
    for session, data in ((server(opened=False), hello_bytes()), (client(opened=False), welcome_bytes())):
        assert session.receive(data[:size]) == []
        assert session.mid_frame
        with pytest.raises(PeerUnreachable) as caught:
            session.receive(b"")
        assert caught.value.peer == session.peer
        assert session.state is State.CLOSED


@given(st.integers(1, 4))
def test_request_ids_wrap_around_zero_and_what_is_in_flight(in_flight: int) -> None:
    session = client()
    assert [session.send_request(GetLoad())[0] for _ in range(in_flight)] == list(range(1, in_flight + 1))
    session._last_id = 0xFFFFFFFE
    assert [session.send_request(GetLoad())[0] for _ in range(2)] == [0xFFFFFFFF, in_flight + 1]


def test_our_own_mistakes_are_assertions() -> None:
    with pytest.raises(AssertionError):
        client(opened=False).send_request(GetLoad())
    with pytest.raises(AssertionError):
        server(opened=False).send_welcome()
    full = client()
    for _ in range(limits.MAX_REQUESTS_IN_FLIGHT):
        full.send_request(GetLoad())
    with pytest.raises(AssertionError):
        full.send_request(GetLoad())
