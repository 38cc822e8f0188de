"""Two ends of a session, and the bytes that either may send: for tests of the session's state machine."""

from __future__ import annotations

import pytest
from support.wire import MODEL, SECRET, peer, raw_frame

from moehive.protocol.codec import Message, encode
from moehive.protocol.errors import (
    ProtocolViolation,
    RefusalCode,
)
from moehive.protocol.messages import (
    PEER,
    GetChunkList,
    GetChunks,
    GetLoad,
    Load,
    ProtocolSpec,
    Refused,
    Welcome,
)
from moehive.protocol.proofs import Admission
from moehive.protocol.session import (
    Buffers,
    ClientSession,
    Opened,
    RequestReceived,
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


def asked(session: ClientSession) -> ClientSession:
    assert session.send_request(GetLoad())[0] == 1
    return session


def asked_of(session: ServerSession) -> ServerSession:
    assert session.receive(message_bytes(GetLoad(), 1)) == [RequestReceived(1, GetLoad(), bytearray())]
    return session
