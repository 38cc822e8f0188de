"""What a client does at addresses that a peer names: it finds the peer, or learns and tells nothing. Real sockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from support.bulk import (
    PATIENCE,
    SERVER,
    FakeShelf,
    all_that_comes,
    data_of,
    frame,
    impostor,
    offer_at,
    offer_of,
    serving,
)
from support.references import without_collector

from moehive.protocol.errors import NotAdmitted, PeerError, PeerUnreachable
from moehive.protocol.messages import BulkOffer, Chunk, Welcome
from moehive.swarm.transfer.tls.certificate import Certificate
from moehive.swarm.transfer.tls.dialling import dial
from moehive.swarm.transfer.tls.link import TlsLink
from moehive.swarm.transfer.tls.server import BulkServer

SHELF = FakeShelf(data_of(1))
TLS_HANDSHAKE = 22  # the first byte of such a record


@pytest.fixture
async def server() -> AsyncIterator[BulkServer]:
    async with serving(SHELF) as running:
        yield running


async def dialled(offer: BulkOffer) -> PeerError | None:
    """How dialling ends; None for a channel that works."""
    try:
        channel = await asyncio.wait_for(dial(offer, SERVER, "client"), PATIENCE)
    except PeerError as error:
        return error
    try:
        await channel.chunk_list(SHELF.hash, timeout=PATIENCE)
    finally:
        await channel.close()
    return None


def tls_server(behave: Callable[[ssl.SSLSocket], None], certificate: Certificate) -> Callable[[socket.socket], None]:
    """For `impostor`: one that speaks TLS, with a certificate of its own."""

    def handle(sock: socket.socket) -> None:
        with certificate.context.wrap_socket(sock, server_side=True) as tls:
            behave(tls)

    return handle


# --- somebody else is there -------------------------------------------------------------------------------------------


async def test_another_certificate_gets_no_token(server: BulkServer) -> None:
    """The client goes away after the handshake, without a byte."""
    heard: list[bytes] = []
    listening = threading.Event()

    def listen(tls: ssl.SSLSocket) -> None:
        heard.append(all_that_comes(tls))
        listening.set()

    real = offer_of(server)
    with impostor(tls_server(listen, Certificate())) as port:
        error = await dialled(offer_at(port, fingerprint=real.fingerprint, token=real.token))
        assert isinstance(error, PeerUnreachable)
        assert error.reason.endswith("belongs to somebody else")
        assert await asyncio.to_thread(listening.wait, PATIENCE)
    assert heard == [b""]
    assert await dialled(real) is None  # the token is still good


def http(sock: socket.socket) -> None:
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def hang_up(sock: socket.socket) -> None:
    pass


def babble(sock: socket.socket) -> None:
    with suppress(OSError):
        while True:
            sock.sendall(bytes(range(256)) * 256)


def old_tls(sock: socket.socket) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.wrap_socket(sock, server_side=True)


@pytest.mark.parametrize("behave", [http, hang_up, babble, old_tls])
async def test_someone_elses_service_gets_a_greeting_and_nothing_else(behave: Callable[[socket.socket], None]) -> None:
    with impostor(behave) as port:
        assert isinstance(await dialled(offer_at(port)), PeerUnreachable)


async def test_what_a_stranger_hears_is_a_client_hello() -> None:
    heard: list[bytes] = []

    def record(sock: socket.socket) -> None:
        heard.append(sock.recv(4096))
        sock.sendall(b"\x15\x03\x03\x00\x02\x02\x28")  # handshake failure
        heard.append(all_that_comes(sock))

    with impostor(record) as port:
        assert isinstance(await dialled(offer_at(port, token=b"T" * 32)), PeerUnreachable)
    assert heard[0][0] == TLS_HANDSHAKE
    assert b"T" * 32 not in heard[0]
    assert heard[1:] in ([], [b""])


async def test_a_silent_listener_costs_the_deadline_and_leaves_nothing_open() -> None:
    closed = threading.Event()

    def silent(sock: socket.socket) -> None:
        all_that_comes(sock)
        closed.set()

    with impostor(silent) as port:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await dial(offer_at(port), SERVER, "client")
        assert await asyncio.to_thread(closed.wait, PATIENCE)


@pytest.mark.parametrize(
    "addresses",
    [
        (),
        ("/ip4/127.0.0.1/udp/5/quic-v1", "nonsense", "/ip4/127.0.0.1/tcp/99999"),
        ("/ip4/127.0.0.1/tcp/1/p2p/X/p2p-circuit",),
        ("/ip4/999.1.1.1/tcp/1",),
        ("/ip4/127.0.0.1/tcp/0",),
    ],
)
async def test_addresses_that_lead_nowhere(addresses: tuple[str, ...]) -> None:
    offer = BulkOffer(addresses=addresses, fingerprint=bytes(32), token=bytes(32), lifetime=1.0)
    assert isinstance(await dialled(offer), PeerUnreachable)


async def test_one_good_address_among_bad_ones_is_found(server: BulkServer) -> None:
    """At once: those that say nothing do not hold it up."""
    with socket.create_server(("127.0.0.1", 0)) as silent, impostor(http) as other:
        real = offer_of(server)
        addresses = (
            f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",
            f"/ip4/127.0.0.1/tcp/{other}",
            "/ip4/127.0.0.1/tcp/1",
            *real.addresses,
        )
        mixed = BulkOffer(addresses=addresses, fingerprint=real.fingerprint, token=real.token, lifetime=30.0)
        assert await dialled(mixed) is None


async def test_the_same_server_twice_is_no_matter(server: BulkServer) -> None:
    real = offer_of(server)
    twice = BulkOffer(
        addresses=real.addresses * 4, fingerprint=real.fingerprint, token=real.token, lifetime=real.lifetime
    )
    assert await dialled(twice) is None


# --- the peer is there, and does not keep to the protocol -------------------------------------------------------------


async def after_the_handshake(behave: Callable[[ssl.SSLSocket], None]) -> PeerError | None:
    certificate = Certificate()
    with impostor(tls_server(behave, certificate)) as port:
        return await dialled(offer_at(port, fingerprint=certificate.fingerprint))


async def test_a_token_that_is_not_taken() -> None:
    def close(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)

    error = await after_the_handshake(close)
    assert isinstance(error, PeerUnreachable)


async def test_a_receipt_for_another_token() -> None:
    def lie(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)
        tls.sendall(frame(Welcome(agent="x", proof=bytes(32)), 0))
        all_that_comes(tls)

    assert isinstance(await after_the_handshake(lie), NotAdmitted)


@pytest.mark.parametrize("words", [frame(Chunk(index=0), 1, b"x"), bytes(64), b"\xff" * 64])
async def test_anything_but_a_welcome(words: bytes) -> None:
    def say(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)
        tls.sendall(words)
        all_that_comes(tls)

    assert isinstance(await after_the_handshake(say), PeerError)


async def test_of_an_attempt_that_failed_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[weakref.ref[TlsLink]] = []
    make = TlsLink.__init__

    def watched(link: TlsLink, *arguments: object) -> None:
        links.append(weakref.ref(link))
        make(link, *arguments)  # type: ignore[arg-type]

    async def unreachable(offer: BulkOffer) -> None:
        with suppress(PeerUnreachable):  # not `wait_for`, whose frame holds its task, and that the error
            async with asyncio.timeout(PATIENCE):
                await dial(offer, SERVER, "client")

    monkeypatch.setattr(TlsLink, "__init__", watched)
    with impostor(lambda sock: None) as closes_at_once, without_collector():
        await unreachable(offer_at(closes_at_once, closes_at_once))
        await asyncio.sleep(0)  # the event loop holds what woke us
        assert len(links) == 2
        assert not any(link() for link in links)


async def test_a_reset_before_anything_came_is_the_peers_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
    theirs.close()
    ours.setblocking(False)
    link = TlsLink(ours, SERVER)
    with pytest.raises(PeerUnreachable, match="connection lost"):
        await asyncio.wait_for(link.read(1), PATIENCE)
    link.close()
