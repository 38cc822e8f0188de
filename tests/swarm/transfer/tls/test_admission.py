"""Who gets in at the bulk port, with real sockets: whoever shows a good token, in time. Others learn nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
from support.bulk import (
    CLIENT,
    PATIENCE,
    FakeShelf,
    all_that_comes,
    channel_to,
    connect,
    data_of,
    frame,
    hello,
    offer_of,
    serving,
    soon,
    tls_to,
)
from support.swarm_fakes import Clock

from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import GetChunkList, GetChunks
from moehive.swarm.rpc.server import Refusal
from moehive.swarm.transfer.tls import server as module
from moehive.swarm.transfer.tls.certificate import client_context, fingerprint_of
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.tls.tokens import LIFETIME, MAX_PER_PEER

SHELF = FakeShelf(data_of(2))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


TLS_ALERT = 21  # the first byte of such a record


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
async def server(clock: Clock) -> AsyncIterator[BulkServer]:
    async with serving(SHELF, clock=clock) as running:
        yield running


async def gets_in(server: BulkServer) -> bool:
    """An honest client is served."""
    async with channel_to(server) as channel:
        return await channel.chunk_list(SHELF.hash, timeout=PATIENCE) == SHELF.chunks


def said_to(server: BulkServer, *pieces: bytes) -> bytes:
    """What it answers to bytes after a handshake, until it closes."""
    with tls_to(server) as tls:
        for piece in pieces:
            tls.sendall(piece)
        return all_that_comes(tls)


# --- tokens -----------------------------------------------------------------------------------------------------------


async def test_a_good_token_opens_a_connection(server: BulkServer) -> None:
    assert await gets_in(server)


async def test_without_a_token_nothing_is_said(server: BulkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADMISSION_TIMEOUT", 1.0)
    assert await asyncio.to_thread(said_to, server) == b""


@pytest.mark.parametrize("early", [GetChunkList(hash=SHELF.hash), GetChunks(hash=SHELF.hash, first=0, count=1)])
async def test_a_request_instead_of_a_token_gets_nothing(server: BulkServer, early: GetChunkList | GetChunks) -> None:
    offer_of(server)
    assert await asyncio.to_thread(said_to, server, frame(early, 1)) == b""


async def test_a_wrong_token_gets_nothing(server: BulkServer) -> None:
    offer_of(server)
    assert await asyncio.to_thread(said_to, server, hello(bytes(32))) == b""


async def test_an_expired_token_gets_nothing(server: BulkServer, clock: Clock) -> None:
    offer = offer_of(server)
    clock.now += LIFETIME
    assert await asyncio.to_thread(said_to, server, hello(offer.token)) == b""


async def test_a_token_shown_in_time_counts_whatever_the_clock_did_before(server: BulkServer, clock: Clock) -> None:
    clock.now -= 500
    offer = offer_of(server)
    clock.now += LIFETIME - 1
    with tls_to(server) as tls:
        tls.sendall(hello(offer.token))
        assert await asyncio.to_thread(tls.recv, 100)


async def test_a_token_opens_one_connection_only(server: BulkServer) -> None:
    offer = offer_of(server)
    with tls_to(server) as tls:
        tls.sendall(hello(offer.token))
        assert await asyncio.to_thread(tls.recv, 100)
        assert await asyncio.to_thread(said_to, server, hello(offer.token)) == b""


async def test_another_peers_token_is_none_here(server: BulkServer) -> None:
    async with serving(SHELF) as other:
        foreign = offer_of(other)
        assert await asyncio.to_thread(said_to, server, hello(foreign.token)) == b""
        assert await gets_in(other)


async def test_whoever_shows_a_token_is_the_peer_it_was_given_to(
    server: BulkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PER_PEER", 1)
    async with channel_to(server, CLIENT):
        with pytest.raises(Refusal):
            offer_of(server, CLIENT)
        async with channel_to(server, PeerId("another")):
            pass


async def test_only_the_latest_tokens_of_a_peer_count(server: BulkServer) -> None:
    offers = [offer_of(server) for _ in range(MAX_PER_PEER + 1)]
    assert await asyncio.to_thread(said_to, server, hello(offers[0].token)) == b""
    with tls_to(server) as tls:
        tls.sendall(hello(offers[1].token))
        assert await asyncio.to_thread(tls.recv, 100)


async def test_a_peer_gets_no_more_connections_than_it_may_have(
    server: BulkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tokens that it saved up, too."""
    monkeypatch.setattr(module, "MAX_PER_PEER", 1)
    offers = [offer_of(server) for _ in range(2)]
    with tls_to(server) as tls:
        tls.sendall(hello(offers[0].token))
        assert await asyncio.to_thread(tls.recv, 100)
        with pytest.raises(Refusal) as refused:
            offer_of(server)
        assert (refused.value.code, refused.value.retry_after > 0) == (RefusalCode.BUSY, True)
        assert await asyncio.to_thread(said_to, server, hello(offers[1].token)) == b""
    assert await soon(lambda: not server._connections)
    assert await gets_in(server)


# --- other ways to knock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x13/multistream/1.0.0\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        bytes(200),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
    ],
    ids=["http", "libp2p", "ssh", "zeros", "no client hello"],
)
async def test_other_protocols_learn_at_most_that_this_is_tls(server: BulkServer, words: bytes) -> None:
    def knock() -> bytes:
        with connect(server) as sock:
            try:
                sock.sendall(words)
            except ConnectionError:  # closed before all was said
                return b""
            return all_that_comes(sock)

    answer = await asyncio.to_thread(knock)
    assert len(answer) <= 7
    assert not answer or answer[0] == TLS_ALERT
    assert await gets_in(server)


async def test_older_tls_is_refused(server: BulkServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)version"):
        await asyncio.to_thread(context.wrap_socket, connect(server))
    assert await gets_in(server)


async def test_the_certificate_names_nobody(server: BulkServer) -> None:
    context = client_context()
    with await asyncio.to_thread(context.wrap_socket, connect(server)) as tls:
        certificate = tls.getpeercert(binary_form=True)
        assert tls.version() == "TLSv1.3"
    assert certificate is not None
    assert fingerprint_of(certificate) == offer_of(server).fingerprint
    assert len(certificate) < 400
    assert b"moehive" not in certificate


async def test_every_start_has_a_certificate_of_its_own(server: BulkServer) -> None:
    async with serving(SHELF) as other:
        assert offer_of(other).fingerprint != offer_of(server).fingerprint


async def test_nobody_blocks_the_door(server: BulkServer) -> None:
    """More connections than there are places say nothing at all; the oldest of them make room."""
    silent = [connect(server) for _ in range(module.MAX_UNADMITTED + 8)]
    try:
        assert await soon(lambda: len(server._unadmitted) == module.MAX_UNADMITTED)
        assert await gets_in(server)
        assert await asyncio.to_thread(all_that_comes, silent[0]) == b""
    finally:
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("handshake", [False, True], ids=["never handshakes", "never shows a token"])
async def test_who_says_nothing_is_let_go(server: BulkServer, handshake: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADMISSION_TIMEOUT", 1.0)
    with connect(server) as sock:
        if handshake:
            sock = await asyncio.to_thread(client_context().wrap_socket, sock)
        assert await asyncio.to_thread(all_that_comes, sock) == b""
        sock.close()
    assert await soon(lambda: not server._unadmitted)


async def test_a_token_that_trickles_in_gets_no_new_deadline(
    server: BulkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADMISSION_TIMEOUT", 1.0)
    words = hello(offer_of(server).token)

    def trickle() -> bytes:
        with tls_to(server) as tls:
            tls.settimeout(0.05)
            for byte in words[:-1]:  # that would take ten times as long
                try:
                    tls.sendall(bytes([byte]))
                    if tls.recv(100) == b"":
                        return b"closed"
                except TimeoutError:
                    continue
                except OSError:
                    return b"closed"
            return b"open"

    assert await asyncio.to_thread(trickle) == b"closed"


async def test_requests_may_come_with_the_token(server: BulkServer) -> None:
    def ask() -> bytes:
        with tls_to(server) as tls:
            tls.sendall(hello(offer_of(server).token) + frame(GetChunkList(hash=SHELF.hash), 1))
            said = b""
            while SHELF.chunks.to_bytes() not in said:
                said += tls.recv(4096)
            return said

    assert await asyncio.to_thread(ask)


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_closing_the_server_ends_all_connections() -> None:
    async with serving(SHELF) as server:
        silent = connect(server)
        admitted = await asyncio.to_thread(client_context().wrap_socket, connect(server))
        admitted.sendall(hello(offer_of(server).token))
        assert await asyncio.to_thread(admitted.recv, 100)
        assert await soon(lambda: len(server._unadmitted) == 1)
        threads = tuple(server._threads)
    assert not any(thread.is_alive() for thread in threads)
    assert all_that_comes(silent) == b""
    assert all_that_comes(admitted) == b""
    silent.close()
    admitted.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


async def test_a_port_that_is_taken_is_an_error_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(module.TransportError, match=f"{port}.*--bulk-port"):
            await BulkServer(
                ("/ip4/127.0.0.1/tcp/0",), port, agent="server", shelf=SHELF, uploads=module.Uploads()
            ).__aenter__()


@pytest.mark.parametrize(
    ("listen", "hosts"),
    [
        (["/ip4/127.0.0.1/tcp/4001"], ("127.0.0.1",)),
        (["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/tcp/4002", "/ip6/::/tcp/4001"], ("0.0.0.0", "::")),
        (["/ip4/1.2.3.4/tcp/5/ws"], ()),
    ],
)
def test_it_listens_where_the_node_does(listen: list[str], hosts: tuple[str, ...]) -> None:
    assert module.interfaces(listen) == hosts


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
async def test_both_families_share_the_port() -> None:
    announced = ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2", "/ip4/127.0.0.1/tcp/3", "/dns/a.b/tcp/4")
    listen = ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")
    async with BulkServer(listen, 0, agent="server", shelf=SHELF, uploads=module.Uploads()) as server:
        offer, port = server.offer(CLIENT, announced), server.port
        assert offer.addresses == (f"/ip4/127.0.0.1/tcp/{port}", f"/ip6/::1/tcp/{port}", f"/dns/a.b/tcp/{port}")
        socket.create_connection(("::1", port), timeout=PATIENCE).close()
