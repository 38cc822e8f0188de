"""The source of the transfer benchmark: a process that has an object on disk and sends it by every carrier.

For each carrier it also sends plain bytes as fast as that goes: what a verified download is compared with.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from _common import questions

from moehive.node.services import ShardService
from moehive.protocol.bits import Bits, full
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_count
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, BulkOffer
from moehive.swarm.identity import Identity
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.background import start_thread
from moehive.swarm.transfer.pacing import paced
from moehive.swarm.transfer.tls.certificate import Certificate
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.uploads import PIECE, Uploads
from moehive.swarm.transport.base import Stream
from moehive.swarm.transport.hivemind import HivemindTransport

SECRET = bytes(32)
RAW = "/moehive-bench/raw/1.0.0"
HOT = ShardHash("0" * 64)  # an object that costs its source nothing: one buffer, sent again and again
LISTEN = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True, slots=True)
class Where:
    """What a client must know of the source."""

    peer: PeerId
    addresses: tuple[str, ...]
    raw_port: int
    raw_fingerprint: bytes
    pid: int
    daemon_pid: int


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, all its threads together (Linux: the process's CPU clock)."""
    return time.clock_gettime((~pid << 3) | 2)


class Shelf:
    """A store whose every byte is verified on its way out, and the hot object. `cpu`: seconds spent on reading."""

    def __init__(self, store: ContentStore, hot_bytes: int) -> None:
        self.cpu = 0.0
        self._store = store
        self._hot = ChunkList(hot_bytes, (bytes(32),) * chunk_count(hot_bytes))
        self._buffer = os.urandom(CHUNK_SIZE)

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See `supply.Shelf`."""
        return self._hot if object_hash == HOT else self._store.chunk_list(object_hash)

    def have(self, object_hash: ShardHash) -> Bits:
        """See `supply.Shelf`."""
        return full(chunk_count(self.chunk_list(object_hash).size))

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See `supply.Shelf`. One reader at a time, here."""
        if object_hash == HOT:
            return self._buffer
        started = time.thread_time()
        data = self._store.read_range(object_hash, offset, length)
        self.cpu += time.thread_time() - started
        return data


def serve(pipe: Connection, root: Path, size: int) -> None:
    """Say where we are, then obey: ("rate", bytes per second or None) or ("cpu", None). Answers: seconds of reading."""
    asyncio.run(_serve(pipe, root, size))


async def _serve(pipe: Connection, root: Path, size: int) -> None:
    uploads = Uploads()
    shelf = Shelf(ContentStore(root, 1 << 40), size)
    raw = RawServer(uploads, size)
    async with (
        HivemindTransport(Identity.ephemeral()) as transport,
        BulkServer((LISTEN,), 0, agent="bench", shelf=shelf, uploads=uploads) as bulk,
    ):

        def offer(peer: PeerId) -> BulkOffer:
            return bulk.offer(peer, transport.addresses)

        service = ShardService(shelf, uploads, offer)
        handler = stream_handler(SHARD, SECRET, transport.peer, "bench", service)
        await transport.serve(SHARD.name, paced(handler, uploads))
        await transport.serve(RAW, raw.on_stream)
        daemon = transport._daemon.pid
        assert daemon is not None
        pipe.send(Where(transport.peer, tuple(transport.addresses), raw.port, raw.fingerprint, os.getpid(), daemon))

        def obey() -> None:
            for order, value in questions(pipe):
                if order == "rate":
                    uploads.cap = value
                pipe.send(shelf.cpu)

        await asyncio.to_thread(obey)


class RawServer:
    """Sends `size` bytes to everybody who comes: by TLS from its own port, and by streams of the daemon."""

    def __init__(self, uploads: Uploads, size: int) -> None:
        self._uploads = uploads
        self._size = size
        self._certificate = Certificate()
        self._buffer = memoryview(os.urandom(CHUNK_SIZE))
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where TLS connections are taken."""
        return int(self._listener.getsockname()[1])

    @property
    def fingerprint(self) -> bytes:
        """Of the certificate that is shown there."""
        return self._certificate.fingerprint

    async def on_stream(self, stream: Stream) -> None:
        """The daemon's way; the receiver closes."""
        for _ in range(self._size // CHUNK_SIZE):
            for piece in self._pieces():
                await asyncio.sleep(self._uploads.pay(len(piece)))
                await stream.write(piece)
        await stream.read(1)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            start_thread(lambda sock=sock: self._send(sock), "raw")  # type: ignore[misc]

    def _send(self, sock: socket.socket) -> None:
        with suppress(OSError), self._certificate.context.wrap_socket(sock, server_side=True) as tls:
            for _ in range(self._size // CHUNK_SIZE):
                for piece in self._pieces():
                    time.sleep(self._uploads.pay(len(piece)))
                    tls.sendall(piece)
            with suppress(ssl.SSLError):
                tls.recv(1)

    def _pieces(self) -> list[memoryview]:
        size = CHUNK_SIZE if self._uploads.rate is None else PIECE
        return [self._buffer[start : start + size] for start in range(0, CHUNK_SIZE, size)]
