"""Peers that were admitted and misbehave: a lying or stalling server, a client that does not read or asks for nonsense.

Each costs its own connection, and the honest ones beside it nothing. Real sockets, and frames made by hand.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from support.bulk import (
    CLIENT,
    PATIENCE,
    SERVER,
    Collected,
    FakeShelf,
    all_that_comes,
    channel_to,
    data_of,
    eventually,
    frame,
    hello,
    impostor,
    offer_at,
    offer_of,
    serving,
    soon,
    tls_to,
)

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.codec import Message
from moehive.protocol.errors import IntegrityError, PeerError, PeerTimeout, PeerUnreachable, ProtocolViolation
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import (
    Cancel,
    Chunk,
    ChunkHashes,
    GetChunkList,
    GetChunks,
    Have,
    OpenBulk,
    Refused,
    Welcome,
)
from moehive.protocol.proofs import _receipt
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.transfer.tls import served as module
from moehive.swarm.transfer.tls.certificate import Certificate
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transfer.tls.dialling import dial
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.uploads import Uploads

SHELF = FakeShelf(data_of(8))
CHUNK = SHELF.data[:CHUNK_SIZE]
MORE = 1


# --- servers ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def channel_to_liar(answer: Callable[[ssl.SSLSocket], None]) -> AsyncIterator[TlsChannel]:
    """A channel to a server that takes the token, waits for one request, and then does as `answer` says."""
    certificate, token = Certificate(), b"t" * 32

    def behave(sock: object) -> None:
        with certificate.context.wrap_socket(sock, server_side=True) as tls:  # type: ignore[arg-type]
            tls.recv(4096)
            tls.sendall(frame(Welcome(agent="liar", proof=_receipt(token)), 0))
            tls.recv(4096)
            answer(tls)
            all_that_comes(tls)

    with impostor(behave) as port:
        offer = offer_at(port, fingerprint=certificate.fingerprint, token=token)
        channel = await asyncio.wait_for(dial(offer, SERVER, "client"), PATIENCE)
        try:
            yield channel
        finally:
            await channel.close()


def saying(*frames: bytes) -> Callable[[ssl.SSLSocket], None]:
    return lambda tls: tls.sendall(b"".join(frames))


def chunk(index: int, *, more: bool = False, request_id: int = 1, data: bytes = CHUNK) -> bytes:
    return frame(Chunk(index=index), request_id, data, flags=MORE * more)


async def lied_to(answer: Callable[[ssl.SSLSocket], None], timeout: float = PATIENCE) -> tuple[PeerError, Collected]:
    """How a request for chunks 0 and 1 ends, and what was delivered."""
    collected = Collected()
    async with channel_to_liar(answer) as channel:
        with pytest.raises(PeerError) as caught:
            await channel.get_chunks(SHELF.hash, 0, 2, collected, timeout=timeout)
    assert caught.value.peer == SERVER
    return caught.value, collected


LIES = {
    "the wrong chunk": chunk(1, more=True),
    "a chunk twice": chunk(0, more=True) + chunk(0),
    "too few": chunk(0),
    "too many": chunk(0, more=True) + chunk(1, more=True) + chunk(2),
    "the answer to another question": frame(ChunkHashes(size=5), 1, bytes(32)),
    "the answer to nobody's question": chunk(0, request_id=7),
    "a chunk of more than 1 MiB": frame(Chunk(index=0), 1, bytes(CHUNK_SIZE + 1), flags=MORE),
    "a refusal with a payload": frame(Refused(code=1, detail="", retry_after=0.0), 1, b"x"),
    "no frame": b"HTTP/1.1 200 OK\r\n\r\n",
    "a welcome again": frame(Welcome(agent="liar", proof=bytes(32)), 0),
    "a question": frame(GetChunkList(hash=SHELF.hash), 1),
}


@pytest.mark.parametrize("words", LIES.values(), ids=LIES.keys())
async def test_a_server_that_breaks_the_protocol_is_found_out(words: bytes) -> None:
    error, collected = await lied_to(saying(words))
    assert isinstance(error, ProtocolViolation)
    assert collected.indices in ([], [0], [0, 1])


async def test_a_refusal_of_everything_ends_the_channel() -> None:
    error, _ = await lied_to(saying(frame(Refused(code=8, detail="bye", retry_after=0.0), 0)))
    assert "bye" in str(error)


@pytest.mark.parametrize("size", [5, 20, 100, CHUNK_SIZE // 2, CHUNK_SIZE + 20])
async def test_the_end_inside_an_answer_is_a_lost_connection(size: int) -> None:
    def stop(tls: ssl.SSLSocket) -> None:
        tls.sendall((chunk(0, more=True) + chunk(1))[:size])
        tls.unwrap()  # an orderly end of TLS is no end of an answer

    error, collected = await lied_to(stop)
    assert isinstance(error, PeerUnreachable)
    assert collected.indices in ([], [0])


async def test_a_server_that_sends_byte_by_byte_is_given_up() -> None:
    stop = threading.Event()

    def trickle(tls: ssl.SSLSocket) -> None:
        for byte in chunk(0, more=True):
            if stop.wait(0.01):
                return
            tls.sendall(bytes([byte]))

    try:
        error, collected = await lied_to(trickle, timeout=0.5)
    finally:
        stop.set()
    assert isinstance(error, PeerTimeout)
    assert not collected.chunks


async def test_the_list_of_another_object_is_a_proven_lie() -> None:
    async with channel_to_liar(saying(frame(ChunkHashes(size=5), 1, bytes(32)))) as channel:
        with pytest.raises(IntegrityError):
            await channel.chunk_list(SHELF.hash, timeout=PATIENCE)


@pytest.mark.parametrize(
    "reply", [(ChunkHashes(size=5), bytes(31)), (ChunkHashes(size=1 << 30), b"")], ids=["short", "empty"]
)
async def test_a_list_that_contradicts_itself(reply: tuple[Message, bytes]) -> None:
    async with channel_to_liar(saying(frame(reply[0], 1, reply[1]))) as channel:
        with pytest.raises(ProtocolViolation):
            await channel.chunk_list(SHELF.hash, timeout=PATIENCE)


async def test_a_have_map_of_another_size() -> None:
    async with channel_to_liar(saying(frame(Have(size=9 * CHUNK_SIZE, complete=False), 1, bytes(1)))) as channel:
        with pytest.raises(ProtocolViolation):
            await channel.have(SHELF.hash, timeout=PATIENCE)


async def test_a_have_map() -> None:
    async with channel_to_liar(saying(frame(Have(size=9 * CHUNK_SIZE, complete=False), 1, b"\x05\x01"))) as channel:
        assert await channel.have(SHELF.hash, timeout=PATIENCE) == {0, 2, 8}


async def test_a_server_that_never_reads_is_given_up_before_the_loop_waits_for_it() -> None:
    """Requests are small; their number is bounded by what is in flight. Withdrawn ones count until confirmed."""
    deaf = threading.Event()

    def ignore(tls: ssl.SSLSocket) -> None:
        deaf.wait(PATIENCE)

    async with channel_to_liar(ignore) as channel:
        for _ in range(200):
            with pytest.raises(PeerTimeout):
                await channel.have(SHELF.hash, timeout=0.001)
        deaf.set()


# --- clients ----------------------------------------------------------------------------------------------------------


@contextmanager
def admitted(server: BulkServer, peer: PeerId = CLIENT) -> Iterator[ssl.SSLSocket]:
    """A client without our code, past its token."""
    with tls_to(server) as tls:
        tls.sendall(hello(offer_of(server, peer).token))
        assert tls.recv(4096)
        yield tls


def ask_for(count: int = 8, request_id: int = 1) -> bytes:
    return frame(GetChunks(hash=SHELF.hash, first=0, count=count), request_id)


BAD_REQUESTS = {
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
    "a reply": chunk(0, data=b""),
    "a payload": frame(GetChunkList(hash=SHELF.hash), 1, b"x"),
    "id 0": frame(GetChunkList(hash=SHELF.hash), 0),
    "hello again": hello(bytes(32)),
    "an id in use": ask_for() + ask_for(),
    "too much in flight": b"".join(ask_for(1, number) for number in range(1, 80)),
}


@pytest.mark.parametrize("words", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
async def test_a_client_that_breaks_the_protocol_is_told_and_dropped(words: bytes) -> None:
    def misbehave(server: BulkServer) -> bytes:
        with admitted(server) as tls:
            tls.sendall(words)
            return all_that_comes(tls)

    async with serving(SHELF) as server:
        said = await asyncio.to_thread(misbehave, server)
        assert bytes([1, Refused.KIND, 0, 0, 0, 0, 0, 0]) in said  # of the whole connection
        async with channel_to(server) as channel:
            assert await channel.chunk_list(SHELF.hash, timeout=PATIENCE) == SHELF.chunks


async def test_a_token_is_not_to_be_had_on_a_bulk_connection() -> None:
    def ask(server: BulkServer) -> bytes:
        with admitted(server) as tls:
            tls.sendall(frame(OpenBulk(), 1))
            return tls.recv(4096)

    async with serving(SHELF) as server:
        assert (await asyncio.to_thread(ask, server))[1] == Refused.KIND


async def test_a_request_that_trickles_in_is_dropped_as_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_TIMEOUT", 0.5)

    def trickle(server: BulkServer) -> bytes:
        with admitted(server) as tls:
            tls.settimeout(0.05)
            for byte in ask_for()[:-1] * 10:
                try:
                    tls.sendall(bytes([byte]))
                    return tls.recv(100)
                except TimeoutError:
                    continue
                except OSError:
                    return b""
            return b"still there"

    async with serving(SHELF) as server:
        assert await asyncio.to_thread(trickle, server) == b""


async def test_a_client_that_does_not_read_is_dropped_and_its_slot_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_TIMEOUT", 0.3)
    async with serving(SHELF) as server:
        with admitted(server) as tls:
            tls.sendall(b"".join(ask_for(8, number) for number in range(1, 9)))  # more than the kernel's buffers
            assert await soon(lambda: not server._connections)
        assert not server._uploads._running
        assert not server._uploads._waiting


async def test_slow_readers_do_not_keep_the_slots_from_others() -> None:
    """As many as there are slots, and none of them reads."""
    limits = UploadLimits(slots=2, slot_seconds=0.2)
    uploads = Uploads(limits)
    deciding = asyncio.create_task(uploads.run())
    async with serving(SHELF, uploads) as server:
        with admitted(server, PeerId("slow 1")) as one, admitted(server, PeerId("slow 2")) as two:
            for tls in (one, two):
                tls.sendall(b"".join(ask_for(8, number) for number in range(1, 9)))
            assert await soon(lambda: len(uploads._running) == 2)
            async with channel_to(server) as channel:
                collected = Collected()
                await channel.get_chunks(SHELF.hash, 0, 8, collected, timeout=PATIENCE)
                assert collected.bytes == SHELF.data[: 8 * CHUNK_SIZE]
    deciding.cancel()


async def test_a_storm_of_requests_and_cancellations_leaves_nothing_behind() -> None:
    def storm(server: BulkServer) -> None:
        with admitted(server) as tls:
            for start in range(1, 2000, 20):
                numbers = range(start, start + 20)
                tls.sendall(b"".join(ask_for(1, number) + frame(Cancel(), number) for number in numbers))
                tls.recv(1 << 16)
            [connection] = server._connections
            while connection._todo:  # until the last of them was seen
                tls.recv(1 << 16)
            assert not connection._unwanted

    async with serving(SHELF) as server:
        await asyncio.to_thread(storm, server)
        assert await soon(lambda: not server._connections)
        assert not server._uploads._running


async def test_what_is_remembered_of_a_cancellation_goes_with_its_request() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def gate(index: int) -> None:
        if index == 1:
            reached.set()
            assert go_on.wait(PATIENCE)

    def cancel(server: BulkServer) -> None:
        with admitted(server) as tls:
            [connection] = server._connections
            tls.sendall(ask_for(8, 1))
            assert reached.wait(PATIENCE)
            tls.sendall(frame(Cancel(), 1))
            go_on.set()
            assert eventually(lambda: not connection._answering)
            assert not connection._unwanted

    async with serving(FakeShelf(SHELF.data, gate)) as server:
        await asyncio.to_thread(cancel, server)
