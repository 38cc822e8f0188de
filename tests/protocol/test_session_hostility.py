"""Sessions: admission, and what a hostile client or server may try."""

from __future__ import annotations

import msgpack
import pytest
from support.session_ends import (
    CHUNKS,
    CLIENT,
    CLIENT_SIDE,
    LIST,
    LOAD,
    SERVER,
    SERVER_SIDE,
    asked,
    asked_of,
    client,
    hello_bytes,
    message_bytes,
    refused_bytes,
    server,
    violates,
    welcome_bytes,
)
from support.wire import MODEL, SECRET, peak_bytes, peer, raw_frame

from moehive.protocol import limits
from moehive.protocol.codec import encode
from moehive.protocol.errors import (
    NotAdmitted,
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
    ExpertsDone,
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
from moehive.protocol.proofs import Admission
from moehive.protocol.session import (
    Opened,
    RequestReceived,
)

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
