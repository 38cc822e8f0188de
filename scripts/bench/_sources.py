"""The sources of the benchmark of many sources: processes that supply objects of one store, good ones and bad ones."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from _common import questions

from moehive.node.services import ShardService
from moehive.protocol.bits import Bits
from moehive.protocol.chunks import ChunkList
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, BulkOffer
from moehive.swarm.identity import Identity
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.pacing import paced
from moehive.swarm.transfer.tls.server import BulkServer
from moehive.swarm.transfer.uploads import Uploads
from moehive.swarm.transport.hivemind import HivemindTransport

SECRET = bytes(32)
LISTEN = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True, slots=True)
class Behave:
    """How a source behaves from now on."""

    rate: float | None = None  # bytes per second of all its uploads
    stalls: bool = False  # it accepts requests and sends no chunk
    lies: bool = False  # every chunk is wrong


@dataclass(frozen=True, slots=True)
class Where:
    """How to find a source."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(slots=True)
class Shelf:
    """A store, and what becomes of its bytes. See `supply.Shelf`."""

    store: ContentStore
    lies: bool = False
    free: threading.Event = field(default_factory=threading.Event)  # not set: reading stalls

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        """See `supply.Shelf`."""
        return self.store.chunk_list(object_hash) if self.store.has(object_hash) else None

    def have(self, object_hash: ShardHash) -> Bits:
        """See `supply.Shelf`."""
        return EVERYTHING

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See `supply.Shelf`."""
        self.free.wait()
        data = self.store.read_range(object_hash, offset, length)
        return bytes(length) if self.lies else data


def serve(pipe: Connection, root: Path) -> None:
    """Say where we are, then behave as told; each order is answered with the bytes sent since the last one."""
    asyncio.run(_serve(pipe, root))


async def _serve(pipe: Connection, root: Path) -> None:
    uploads, shelf = Uploads(), Shelf(ContentStore(root, 1 << 40))
    async with (
        HivemindTransport(Identity.ephemeral()) as transport,
        BulkServer((LISTEN,), 0, agent="bench", shelf=shelf, uploads=uploads) as bulk,
    ):

        def offer(peer: PeerId) -> BulkOffer:
            return bulk.offer(peer, transport.addresses)

        handler = stream_handler(SHARD, SECRET, transport.peer, "bench", ShardService(shelf, uploads, offer))
        await transport.serve(SHARD.name, paced(handler, uploads))
        pipe.send(Where(transport.peer, tuple(transport.addresses)))

        def obey() -> None:
            told = 0
            for order in questions(pipe):
                uploads.cap, shelf.lies = order.rate, order.lies
                shelf.free.clear() if order.stalls else shelf.free.set()
                time.sleep(0.05)  # uploads that were cancelled end
                sent, told = uploads.bytes_sent - told, uploads.bytes_sent
                pipe.send(sent)
            shelf.free.set()

        await asyncio.to_thread(obey)
