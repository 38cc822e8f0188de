"""Sessions: every state with every input, two ends in conversation, and everything a hostile end may try."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire import MODEL, SECRET, any_message, peak_bytes, peer, portions, raw_frame

from moehive.protocol import limits
from moehive.protocol.codec import Message, encode
from moehive.protocol.errors import (
    NotAdmitted,
    PeerUnreachable,
    ProtocolViolation,
    RefusalCode,
    UnsupportedVersion,
)
from moehive.protocol.frames import FLAG_MORE, HEADER
from moehive.protocol.messages import (
    EXPERT,
    PEER,
    SHARD,
    Cancel,
    Chunk,
    ChunkHashes,
    ExpertsDone,
    GetChunkList,
    GetChunks,
    GetInventory,
    GetLoad,
    Hello,
    Inventory,
    Load,
    ProtocolSpec,
    Refused,
    RunExperts,
    Welcome,
)
from moehive.protocol.session import (
    CLIENT_TABLE,
    SERVER_TABLE,
    Admission,
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

Session = ClientSession | ServerSession
CLIENT, SERVER = peer(1), peer(2)
CLIENT_SIDE = Admission(secret=SECRET, local=CLIENT, remote=SERVER)
SERVER_SIDE = Admission(secret=SECRET, local=SERVER, remote=CLIENT)
LOAD = Load(queued_requests=1, expected_wait=0.5, rows_done=2, bytes_sent=3)
LIST = GetChunkList(hash=MODEL)  # type: ignore[arg-type]
CHUNKS = GetChunks(hash=MODEL, first=0, count=3)  # type: ignore[arg-type]


def joined(buffers: Buffers) -> bytes:
    return b"".join(bytes(part) for part in buffers)


def client(spec: ProtocolSpec = PEER, *, opened: bool = True) -> ClientSession:
    session = ClientSession(spec, CLIENT_SIDE, "client")
    if opened:
        assert session.receive(welcome_bytes(spec)) == [Opened("server")]
    return session


def server(spec: ProtocolSpec = PEER, *, opened: bool = True) -> ServerSession:
    session = ServerSession(spec, SERVER_SIDE, "server")
    if opened:
        assert session.receive(hello_bytes(spec)) == [Opened("client")]
    return session


def hello_bytes(spec: ProtocolSpec = PEER, admission: Admission = CLIENT_SIDE) -> bytes:
    return joined(ClientSession(spec, admission, "client").send_hello())


def welcome_bytes(spec: ProtocolSpec = PEER, admission: Admission = SERVER_SIDE) -> bytes:
    return raw_frame(Welcome.KIND, encode(Welcome(agent="server", proof=admission.own_proof(spec.name))), request_id=0)


def message_bytes(message: Message, request_id: int = 1, payload: bytes = b"", flags: int = 0) -> bytes:
    return raw_frame(message.KIND, encode(message), payload, request_id=request_id, flags=flags)


def refused_bytes(request_id: int, code: int = RefusalCode.BUSY) -> bytes:
    return message_bytes(Refused(code=code, detail="later", retry_after=1.5), request_id)


def violates(session: Session, data: bytes, kind: type[ProtocolViolation] = ProtocolViolation) -> ProtocolViolation:
    """`data` is a violation that closes the session and names the peer."""
    with pytest.raises(kind) as caught:
        session.receive(data)
    assert session.state is State.CLOSED
    assert caught.value.peer == session.peer
    with pytest.raises(AssertionError):
        session.receive(b"x")
    return caught.value


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


def asked(session: ClientSession) -> ClientSession:
    assert session.send_request(GetLoad())[0] == 1
    return session


def asked_of(session: ServerSession) -> ServerSession:
    assert session.receive(message_bytes(GetLoad(), 1)) == [RequestReceived(1, GetLoad(), bytearray())]
    return session


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


# --- admission ----------------------------------------------------------------------------------------------------

STRANGER = peer(3)
WRONG_PROOFS = {
    "another swarm": Admission(secret=bytes(32), local=CLIENT, remote=SERVER).own_proof(PEER.name),
    "another peer's hello": Admission(secret=SECRET, local=STRANGER, remote=SERVER).own_proof(PEER.name),
    "a hello to another peer": Admission(secret=SECRET, local=CLIENT, remote=STRANGER).own_proof(PEER.name),
    "the other side's own proof": SERVER_SIDE.own_proof(PEER.name),
    "another protocol": CLIENT_SIDE.own_proof(EXPERT.name),
    "zeros": bytes(32),
}


@pytest.mark.parametrize("proof", WRONG_PROOFS.values(), ids=WRONG_PROOFS)
def test_wrong_proofs_are_not_admitted(proof: bytes) -> None:
    hello = message_bytes(Hello(agent="client", proof=proof), request_id=0)
    error = violates(server(opened=False), hello, NotAdmitted)
    assert error.code is RefusalCode.NOT_ADMITTED


@pytest.mark.parametrize(
    "proof",
    [
        Admission(secret=bytes(32), local=SERVER, remote=CLIENT).own_proof(PEER.name),
        Admission(secret=SECRET, local=SERVER, remote=STRANGER).own_proof(PEER.name),
        CLIENT_SIDE.own_proof(PEER.name),  # what we sent, reflected
        SERVER_SIDE.own_proof(SHARD.name),
    ],
)
def test_a_server_with_a_wrong_proof_is_not_admitted(proof: bytes) -> None:
    welcome = message_bytes(Welcome(agent="server", proof=proof), request_id=0)
    violates(client(opened=False), welcome, NotAdmitted)


def test_the_secret_is_not_shown() -> None:
    secret = b"correct horse battery staple 32b"
    shown = repr(Admission(secret=secret, local=CLIENT, remote=SERVER))
    assert "correct" not in shown
    assert secret.hex() not in shown


@pytest.mark.parametrize("spec", [PEER, SHARD, EXPERT], ids=lambda spec: spec.name)
def test_no_payload_is_taken_before_the_proof(spec: ProtocolSpec) -> None:
    """A stranger must not make us hold 64 MiB."""
    header = HEADER.pack(1, Hello.KIND, 0, 0, 60, 1)
    violates(server(spec, opened=False), header)
    violates(client(spec, opened=False), header)


def test_payloads_are_taken_right_behind_the_hello() -> None:
    request = GetLoad()
    run = RunExperts(
        model=MODEL,  # type: ignore[arg-type]
        layer=0,
        tokens=1,
        hidden=1,
        dtype="F32",
        weights_dtype="F32",
        form="rows",
        experts=(0,),
        counts=(1,),
        deadline=1.0,
    )
    session = server(EXPERT, opened=False)
    assert session.receive(hello_bytes(EXPERT) + message_bytes(run, 5, bytes(8))) == [
        Opened("client"),
        RequestReceived(5, run, bytearray(8)),
    ]
    violates(server(PEER), message_bytes(request, 1, b"x"))  # this protocol's requests have none


# --- what a hostile client may try --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hello",
    [
        pytest.param(hello_bytes()[:3] + b"\x01" + hello_bytes()[4:], id="flags"),
        pytest.param(hello_bytes()[:7] + b"\x01" + hello_bytes()[8:], id="a request id"),
        pytest.param(raw_frame(Hello.KIND, b"\x80", request_id=0), id="no fields"),
        pytest.param(raw_frame(Hello.KIND, b"", request_id=0), id="no meta"),
        pytest.param(raw_frame(GetLoad.KIND), id="a request first"),
        pytest.param(raw_frame(Cancel.KIND), id="a cancellation first"),
    ],
)
def test_bad_hellos(hello: bytes) -> None:
    violates(server(opened=False), hello)


def test_hello_twice() -> None:
    violates(server(), hello_bytes())


def test_another_frame_version_is_told() -> None:
    error = violates(server(opened=False), b"\x02" + hello_bytes()[1:], UnsupportedVersion)
    assert error.code is RefusalCode.UNSUPPORTED_VERSION


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(message_bytes(GetLoad(), 0), id="id 0"),
        pytest.param(message_bytes(GetLoad(), 1), id="an id in use"),
        pytest.param(message_bytes(GetLoad(), 2, flags=FLAG_MORE), id="flags"),
        pytest.param(message_bytes(GetLoad(), 2, b"x"), id="payload"),
        pytest.param(message_bytes(Cancel(), 1, b"x"), id="cancel with payload"),
        pytest.param(raw_frame(Cancel.KIND, msgpack.packb({"a": 1})), id="cancel with fields"),
        pytest.param(message_bytes(LIST, 2), id="a request of another protocol"),
        pytest.param(message_bytes(LOAD, 2), id="a reply"),
        pytest.param(message_bytes(Inventory(), 1), id="a reply to the open request"),
        pytest.param(refused_bytes(1), id="a refusal"),
        pytest.param(raw_frame(0, request_id=2), id="kind 0"),
        pytest.param(raw_frame(255, request_id=2), id="kind 255"),
    ],
)
def test_bad_requests(request_bytes: bytes) -> None:
    violates(asked_of(server()), request_bytes)


def test_one_request_too_many() -> None:
    session = server()
    for i in range(limits.MAX_REQUESTS_IN_FLIGHT):
        session.receive(message_bytes(GetLoad(), i + 1))
    violates(session, message_bytes(GetLoad(), 1000))


def test_an_answered_request_makes_room_and_frees_its_id() -> None:
    session = server()
    for i in range(limits.MAX_REQUESTS_IN_FLIGHT):
        session.receive(message_bytes(GetLoad(), i + 1))
    assert session.send_reply(1, LOAD)
    assert session.send_refusal(2, RefusalCode.BUSY)
    assert len(session.receive(message_bytes(GetLoad(), 1) + message_bytes(GetLoad(), 2))) == 2
    violates(session, message_bytes(GetLoad(), 1000))


def test_cancelling_does_not_make_room_by_itself() -> None:
    session = server()
    for i in range(limits.MAX_REQUESTS_IN_FLIGHT):
        session.receive(message_bytes(GetLoad(), i + 1) + message_bytes(Cancel(), i + 1))
    violates(session, message_bytes(GetLoad(), 1000))


def test_cancellations_without_end_hold_no_memory() -> None:
    session = asked_of(server())
    flood = [b"".join(message_bytes(Cancel(), first + i) for i in range(50)) for first in range(2, 2000, 50)]

    def attack() -> None:
        for part in flood:
            assert session.receive(part) == []

    assert peak_bytes(attack) < 60_000  # 2,000 of anything would be more; msgpack's reader is 41,000


# --- what a hostile server may try --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(message_bytes(LOAD, 0), id="id 0"),
        pytest.param(message_bytes(LOAD, 2), id="an id that was not asked"),
        pytest.param(message_bytes(Inventory(), 1), id="the reply to another request"),
        pytest.param(message_bytes(ExpertsDone(waited=0.0, computed=0.0), 1), id="a reply of another protocol"),
        pytest.param(message_bytes(LOAD, 1, flags=FLAG_MORE), id="more where there is one"),
        pytest.param(message_bytes(LOAD, 1) * 2, id="a reply after the final one"),
        pytest.param(message_bytes(LOAD, 1) + refused_bytes(1), id="a refusal after the reply"),
        pytest.param(refused_bytes(1) + message_bytes(LOAD, 1), id="a reply after the refusal"),
        pytest.param(refused_bytes(2), id="refusal of what was not asked"),
        pytest.param(raw_frame(Load.KIND), id="no fields"),
        pytest.param(
            raw_frame(Refused.KIND, encode(Refused(code=1, detail="", retry_after=0.0)), b"x"), id="refusal: payload"
        ),
        pytest.param(
            raw_frame(Refused.KIND, encode(Refused(code=1, detail="", retry_after=0.0)), flags=1), id="refusal: flags"
        ),
        pytest.param(
            raw_frame(Refused.KIND, msgpack.packb({"code": 1, "detail": "", "retry_after": float("nan")})),
            id="refusal: not a number",
        ),
        pytest.param(raw_frame(GetLoad.KIND), id="a request"),
        pytest.param(raw_frame(255), id="kind 255"),
    ],
)
def test_bad_replies(reply: bytes) -> None:
    violates(asked(client()), reply)


@pytest.mark.parametrize("kind", [GetLoad.KIND, Load.KIND, Cancel.KIND, 255])
def test_the_kind_of_a_reply_counts_even_where_its_fields_fit(kind: int) -> None:
    session = client()
    session.send_request(GetInventory(model=MODEL))  # type: ignore[arg-type]
    violates(session, raw_frame(kind, b"\x80"))


def test_more_chunks_than_were_asked_for() -> None:
    session = client(SHARD)
    session.send_request(CHUNKS)
    part = message_bytes(Chunk(index=0), 1, b"x", FLAG_MORE)
    assert len(session.receive(part * 2)) == 2
    violates(session, part)


def test_a_reply_over_the_protocols_limit() -> None:
    violates(asked(client()), HEADER.pack(1, Load.KIND, 0, 1, 10, PEER.max_reply_payload + 1))


@pytest.mark.parametrize(
    "welcome",
    [
        pytest.param(welcome_bytes()[:3] + b"\x01" + welcome_bytes()[4:], id="flags"),
        pytest.param(welcome_bytes()[:7] + b"\x01" + welcome_bytes()[8:], id="a request id"),
        pytest.param(refused_bytes(1), id="refusal of a request"),
        pytest.param(message_bytes(LOAD), id="a reply first"),
    ],
)
def test_bad_welcomes(welcome: bytes) -> None:
    violates(client(opened=False), welcome)


def test_welcome_twice() -> None:
    violates(client(), welcome_bytes())
