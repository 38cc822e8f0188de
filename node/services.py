"""What a node answers: the handlers of the three protocols. They check, refuse with a reason, or hand on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from moehive.protocol import limits
from moehive.protocol.chunks import chunk_count, chunk_range
from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import (
    Chunk,
    ChunkHashes,
    ExpertsDone,
    GetChunkList,
    GetChunks,
    GetInventory,
    GetLoad,
    Inventory,
    Load,
    RunExperts,
)
from moehive.swarm.dispatch.request import tensor_bytes
from moehive.swarm.rpc.server import Refusal, Reply

from .compute import Work
from .holdings import Holdings
from .worker import ComputeWorker

UPLOAD_SLOTS = 8  # chunk requests answered at the same time; more are told to come back
UPLOAD_RETRY = 0.2  # seconds


class ExpertService:
    """/moehive/expert: runs experts that this node holds."""

    def __init__(self, holdings: Holdings, worker: ComputeWorker) -> None:
        self._holdings = holdings
        self._worker = worker
        self._leaving = False
        self._answering = 0  # requests that were accepted and whose answer is not written yet
        self._answered = asyncio.Event()

    def refuse_more(self) -> None:
        """Refuse requests from now on: this node leaves."""
        self._leaving = True

    async def drain(self) -> None:
        """Return when everything that was accepted is answered, the answers written."""
        while self._answering:
            self._answered.clear()
            await self._answered.wait()

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer one RunExperts."""
        assert isinstance(message, RunExperts)
        self._answering += 1
        try:
            await self._run(peer, message, payload, reply)
        finally:
            self._answering -= 1
            self._answered.set()

    async def _run(self, peer: PeerId, message: RunExperts, payload: bytearray, reply: Reply) -> None:
        message.check(len(payload))
        self._check_held(message)
        try:
            work = Work.parse(message, payload)
        except ValueError as error:
            raise Refusal(RefusalCode.BAD_REQUEST, str(error)) from error
        result = await self._worker.submit(work, len(payload), peer)
        waited, computed = (min(seconds, limits.MAX_DEADLINE) for seconds in (result.waited, result.computed))
        done = ExpertsDone(waited=waited, computed=computed)
        await reply(done, (tensor_bytes(result.output),))

    def _check_held(self, message: RunExperts) -> None:
        manifest = self._holdings.manifest
        if self._leaving:
            raise Refusal(RefusalCode.SHUTTING_DOWN)
        if message.model != manifest.model_id:
            raise Refusal(RefusalCode.UNKNOWN_MODEL, f"this node serves model {manifest.model_id}")
        absent = [expert for expert in message.experts if not self._holdings.holds(message.layer, expert)]
        if absent:
            raise Refusal(RefusalCode.NOT_HELD, f"experts {absent[:8]} of layer {message.layer} are not held here")
        if message.hidden != manifest.model.hidden_size:
            raise Refusal(RefusalCode.BAD_REQUEST, f"the model's hidden size is {manifest.model.hidden_size}")
        if message.rows > message.tokens * manifest.model.top_k:
            raise Refusal(RefusalCode.BAD_REQUEST, f"a token has at most {manifest.model.top_k} experts in this model")


class ShardService:
    """/moehive/shard: bytes of objects that this node holds."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._slots = asyncio.Semaphore(UPLOAD_SLOTS)
        self.bytes_sent = 0

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer GetChunkList or GetChunks."""
        if self._slots.locked():
            raise Refusal(RefusalCode.BUSY, f"{UPLOAD_SLOTS} uploads are running", retry_after=UPLOAD_RETRY)
        async with self._slots:
            if isinstance(message, GetChunkList):
                await self._send_list(message, reply)
            else:
                assert isinstance(message, GetChunks)
                await self._send_chunks(message, reply)

    async def _send_list(self, message: GetChunkList, reply: Reply) -> None:
        chunks = await asyncio.to_thread(self._holdings.chunk_list, message.hash)
        if chunks is None:
            raise _not_held(message.hash)
        await reply(ChunkHashes(size=chunks.size), (chunks.to_bytes(),))

    async def _send_chunks(self, message: GetChunks, reply: Reply) -> None:
        chunks = await asyncio.to_thread(self._holdings.chunk_list, message.hash)
        if chunks is None:
            raise _not_held(message.hash)
        stop = message.first + message.count
        if stop > chunk_count(chunks.size):
            raise Refusal(RefusalCode.BAD_REQUEST, f"the object has {chunk_count(chunks.size)} chunks")
        for index in range(message.first, stop):
            offset, length = chunk_range(index, chunks.size)
            data = await asyncio.to_thread(self._holdings.read_range, message.hash, offset, length)
            if data is None:
                raise _not_held(message.hash)
            await reply(Chunk(index=index), (data,), more=index + 1 < stop)
            self.bytes_sent += length


class PeerService:
    """/moehive/peer: what this node holds and how busy it is."""

    def __init__(
        self, holdings: Holdings, worker: ComputeWorker, shards: ShardService, record: Callable[[], bytes]
    ) -> None:
        self._holdings = holdings
        self._worker = worker
        self._shards = shards
        self._record = record  # the signed announcement as of now

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer GetInventory or GetLoad."""
        if isinstance(message, GetInventory):
            if message.model != self._holdings.manifest.model_id:
                raise Refusal(RefusalCode.UNKNOWN_MODEL)
            await reply(Inventory(), (self._record(),))
        else:
            assert isinstance(message, GetLoad)
            await reply(self._load())

    def _load(self) -> Load:
        facts = self._worker.facts
        return Load(
            queued_requests=facts.requests,
            expected_wait=min(facts.expected_wait, limits.MAX_DEADLINE),  # all that the field holds
            rows_done=self._worker.rows_done,
            bytes_sent=self._shards.bytes_sent,
        )


def _not_held(object_hash: ShardHash) -> Refusal:
    return Refusal(RefusalCode.NOT_HELD, f"object {object_hash} is not held here")
