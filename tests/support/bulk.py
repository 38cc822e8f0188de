"""Objects to serve, and both ends of bulk connections, for tests with real sockets on loopback."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from moehive.protocol.bits import Bits, full
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.codec import Message, encode
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, BulkOffer
from moehive.protocol.proofs import ShownToken
from moehive.protocol.session import ClientSession
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.transfer.tls.certificate import client_context
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transfer.tls.dialling import dial
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.uploads import Uploads

CLIENT, SERVER = PeerId("the client"), PeerId("the server")
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
PATIENCE = 60.0  # seconds that a test waits for what should happen at once
CHUNKS = 12  # of the object that is served unless a test says otherwise, and a short one


def data_of(chunks: int, tail: int = 5) -> bytes:
    """Bytes of so many chunks, each different, and a short last one."""
    return b"".join(bytes([index % 251 + 1]) * CHUNK_SIZE for index in range(chunks)) + b"t" * tail


@dataclass
class FakeShelf:
    """One object in memory. `gate`, where set, is called before each read: it may block or raise."""

    data: bytes
    gate: Callable[[int], None] = lambda index: None
    read: list[int] = field(default_factory=list)  # chunks, in the order in which they were read

    def __post_init__(self) -> None:
        self.chunks = ChunkList.of(self.data)

    @property
    def hash(self) -> ShardHash:
        return self.chunks.root

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        return self.chunks if object_hash == self.hash else None

    def have(self, object_hash: ShardHash) -> Bits:
        return full(len(self.chunks.hashes)) if object_hash == self.hash else 0

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes | None:
        if object_hash != self.hash:
            return None
        self.gate(offset // CHUNK_SIZE)
        self.read.append(offset // CHUNK_SIZE)
        return self.data[offset : offset + length]


@dataclass
class Collected:
    """What a `deliver` got. `gate` is called first: it may block or raise."""

    gate: Callable[[int], None] = lambda index: None
    chunks: list[tuple[int, bytes]] = field(default_factory=list)

    def __call__(self, index: int, data: memoryview) -> None:
        self.gate(index)
        self.chunks.append((index, bytes(data)))

    @property
    def indices(self) -> list[int]:
        return [index for index, _ in self.chunks]

    @property
    def bytes(self) -> bytes:
        return b"".join(data for _, data in sorted(self.chunks))


@asynccontextmanager
async def serving(shelf: FakeShelf, uploads: Uploads | None = None, **options: Any) -> AsyncIterator[BulkServer]:
    """A bulk server on loopback."""
    books = uploads or Uploads(UploadLimits())
    async with BulkServer(LISTEN, 0, agent="server", shelf=shelf, uploads=books, **options) as server:
        yield server


def offer_of(server: BulkServer, peer: PeerId = CLIENT) -> BulkOffer:
    """What the server tells an authenticated peer."""
    return server.offer(peer, ("/ip4/127.0.0.1/tcp/1/p2p/X",))


@asynccontextmanager
async def channel_to(server: BulkServer, peer: PeerId = CLIENT) -> AsyncIterator[TlsChannel]:
    """An open channel."""
    channel = await asyncio.wait_for(dial(offer_of(server, peer), SERVER, "client"), PATIENCE)
    try:
        yield channel
    finally:
        await channel.close()


# --- without our client ---------------------------------------------------------------------------------------------


def connect(server: BulkServer) -> socket.socket:
    """A TCP connection to its port."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


@contextmanager
def tls_to(server: BulkServer) -> Iterator[ssl.SSLSocket]:
    """A TLS connection to its port, without a token."""
    with client_context().wrap_socket(connect(server)) as tls:
        yield tls


def hello(token: bytes) -> bytes:
    """The first frame of a client."""
    return b"".join(ClientSession(SHARD, ShownToken(token, SERVER), "client").send_hello())


def frame(message: Message, request_id: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    """Any frame."""
    meta = encode(message)
    head = (1, message.KIND, *flags.to_bytes(2, "big"))
    sizes = b"".join(number.to_bytes(4, "big") for number in (request_id, len(meta), len(payload)))
    return bytes(head) + sizes + meta + payload


def all_that_comes(sock: socket.socket) -> bytes:
    """What the other end says until it closes."""
    said = b""
    with suppress(ConnectionResetError, ssl.SSLEOFError):
        while piece := sock.recv(1 << 16):
            said += piece
    return said


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true before long."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


async def soon(condition: Callable[[], bool]) -> bool:
    """`eventually`, while the event loop goes on."""
    return await asyncio.to_thread(eventually, condition)


# --- a server that does as the test says -----------------------------------------------------------------------------


@contextmanager
def impostor(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something at a port that is not our server: `behave` handles each connection, in a thread. The port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    taken.append(sock)
                    threading.Thread(target=handle, args=(sock,), daemon=True).start()

        def handle(sock: socket.socket) -> None:
            with suppress(OSError):
                behave(sock)
            sock.close()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            for sock in (listener, *taken):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            accepting.join(PATIENCE)


def offer_at(*ports: int, fingerprint: bytes = bytes(32), token: bytes = bytes(32)) -> BulkOffer:
    """An offer of anything."""
    addresses = tuple(f"/ip4/127.0.0.1/tcp/{port}" for port in ports)
    return BulkOffer(addresses=addresses, fingerprint=fingerprint, token=token, lifetime=30.0)


def ascending(indices: list[int]) -> bool:
    """Whether each is larger than the one before."""
    return all(earlier < later for earlier, later in pairwise(indices))


class Gate:
    """Holds up whoever passes, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, index: int) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


async def get(channel: TlsChannel, shelf: FakeShelf, first: int, count: int, timeout: float = PATIENCE) -> Collected:
    collected = Collected()
    await channel.get_chunks(shelf.hash, first, count, collected, timeout=timeout)
    return collected
