"""A stream that is opened with a one-time token: who may open it, and as whom."""

from __future__ import annotations

import pytest
from support.wire import MODEL, peer

from moehive.protocol.codec import encode
from moehive.protocol.errors import NotAdmitted, ProtocolViolation
from moehive.protocol.frames import HEADER, Frame, decode_header
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, Chunk, GetChunks, Refused
from moehive.protocol.proofs import RedeemedToken, ShownToken
from moehive.protocol.session import ClientSession, Opened, ReplyReceived, RequestReceived, ServerSession, State

CLIENT, SERVER = peer(1), peer(2)
TOKEN = bytes(range(32))


class Given:
    """Tokens that were given out, each good once."""

    def __init__(self, **tokens: PeerId) -> None:
        self._left = {bytes.fromhex(token): whose for token, whose in tokens.items()}

    def redeem(self, token: bytes) -> PeerId | None:
        return self._left.pop(token, None)


def server(given: Given) -> ServerSession:
    return ServerSession(SHARD, RedeemedToken(given.redeem), "server")


def client(token: bytes = TOKEN) -> ClientSession:
    return ClientSession(SHARD, ShownToken(token, SERVER), "client")


def sent(buffers: object) -> bytes:
    return b"".join(buffers)  # type: ignore[call-overload, no-any-return]


def test_the_token_says_who_is_at_the_other_end() -> None:
    ours, theirs = client(), server(Given(**{TOKEN.hex(): CLIENT}))
    assert theirs.peer == ""
    assert theirs.receive(sent(ours.send_hello())) == [Opened("client")]
    assert theirs.peer == CLIENT
    assert ours.receive(sent(theirs.send_welcome())) == [Opened("server")]
    request_id, buffers = ours.send_request(GetChunks(hash=MODEL, first=0, count=1))  # type: ignore[arg-type]
    [asked] = theirs.receive(sent(buffers))
    assert isinstance(asked, RequestReceived)
    assert asked.request_id == request_id


@pytest.mark.parametrize("token", [bytes(32), TOKEN[::-1], TOKEN[:-1] + b"\0"])
def test_another_token_opens_nothing(token: bytes) -> None:
    session = server(Given(**{TOKEN.hex(): CLIENT}))
    with pytest.raises(NotAdmitted):
        session.receive(sent(client(token).send_hello()))
    assert session.state is State.CLOSED
    assert session.peer == ""


def test_a_token_opens_one_stream() -> None:
    given = Given(**{TOKEN.hex(): CLIENT})
    server(given).receive(sent(client().send_hello()))
    with pytest.raises(NotAdmitted):
        server(given).receive(sent(client().send_hello()))


def test_nothing_but_the_token_counts_before_it() -> None:
    given = Given(**{TOKEN.hex(): CLIENT})
    asking = client()
    asking.state = State.OPEN
    _, early = asking.send_request(GetChunks(hash=MODEL, first=0, count=1))  # type: ignore[arg-type]
    with pytest.raises(ProtocolViolation):
        server(given).receive(sent(early))
    server(given).receive(sent(client().send_hello()))  # it was not used up


def test_a_server_that_does_not_know_the_token_is_found_out() -> None:
    other = server(Given(**{bytes(32).hex(): CLIENT}))
    other.receive(sent(client(bytes(32)).send_hello()))
    with pytest.raises(NotAdmitted):
        client().receive(sent(other.send_welcome()))


def test_no_token_is_printed() -> None:
    assert TOKEN.hex() not in repr(ShownToken(TOKEN, SERVER))
    assert repr(TOKEN) not in repr(ShownToken(TOKEN, SERVER))


# --- frames that the caller reads itself ------------------------------------------------------------------------------


def opened() -> ClientSession:
    session, theirs = client(), server(Given(**{TOKEN.hex(): CLIENT}))
    theirs.receive(sent(session.send_hello()))
    session.receive(sent(theirs.send_welcome()))
    return session


def frame(kind: int, meta: bytes, payload: bytes = b"", *, flags: int = 0) -> Frame:
    """As whoever reads from a socket makes it."""
    header = decode_header(HEADER.pack(1, kind, flags, 1, len(meta), len(payload)), 1 << 20)
    return Frame(header.kind, header.request_id, header.flags, meta, bytearray(payload))


def test_a_frame_whose_payload_lies_elsewhere_counts_like_any_other() -> None:
    session = opened()
    session.send_request(GetChunks(hash=MODEL, first=3, count=2))  # type: ignore[arg-type]
    first = session.receive_frame(frame(Chunk.KIND, encode(Chunk(index=3)), flags=1))
    assert first == [ReplyReceived(1, Chunk(index=3), bytearray(), True)]
    assert session.in_flight == 1
    session.receive_frame(frame(Chunk.KIND, encode(Chunk(index=4))))
    assert session.in_flight == 0
    with pytest.raises(ProtocolViolation) as caught:
        session.receive_frame(frame(Chunk.KIND, encode(Chunk(index=5))))
    assert caught.value.peer == SERVER
    assert session.state is State.CLOSED


def test_what_a_refusal_must_not_carry_is_still_refused() -> None:
    session = opened()
    session.send_request(GetChunks(hash=MODEL, first=3, count=2))  # type: ignore[arg-type]
    with pytest.raises(ProtocolViolation, match="payload"):
        session.receive_frame(frame(Refused.KIND, encode(Refused(code=1, detail="", retry_after=0.0)), b"x"))


def test_the_payload_limit_rises_with_the_proof() -> None:
    session = client()
    assert session.max_payload == 0
    assert opened().max_payload == SHARD.max_reply_payload
