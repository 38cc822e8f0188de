"""Objects from peers into the store: chunk list first, then chunks, each verified before it is written.

One source at a time; the next one takes over where the last one stopped. The caller says who might have the object.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from moehive.protocol.chunks import ChunkList, chunk_range, runs
from moehive.protocol.errors import IntegrityError, PeerError, ProtocolViolation, ShardUnavailable
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import Chunk, ChunkHashes, GetChunkList, GetChunks

from .log import get_logger
from .rpc.client import Connection
from .rpc.pool import ConnectionPool
from .standings import Standings
from .store.base import PartialBusy, WrongBytes
from .store.content import ContentStore
from .store.partial import PartialObject
from .tasks import task_group

CHUNKS_PER_REQUEST = 8  # at most limits.MAX_CHUNKS_PER_REQUEST
REQUESTS_AT_ONCE = 3  # to one source: 24 MiB on their way cover the latency of any link we know
LIST_TIMEOUT = 20.0
CHUNK_TIMEOUT = 30.0  # seconds for each 1 MiB; a slower source is left for another one
RETRY_AFTER = 0.25  # seconds before looking again while nobody can go on
_log = get_logger(__name__)

Sources = Mapping[PeerId, Sequence[str]]  # peer -> addresses
FindSources = Callable[[], Awaitable[Sources]]
Progress = Callable[[int], None]  # bytes that have just been verified


class Fetcher:
    """Downloads into one store. Lives on the event loop; disk and hashing run in threads."""

    def __init__(
        self,
        pool: ConnectionPool,
        standings: Standings,
        store: ContentStore,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._standings = standings
        self._store = store
        self._clock = clock

    async def fetch(
        self,
        object_hash: ShardHash,
        sources: FindSources,
        *,
        name: str = "",
        progress: Progress | None = None,
        timeout: float = 60.0,
    ) -> Path:
        """The object's file, complete and verified.

        `sources` is asked again for each attempt. After `timeout` seconds without anybody who could go on, raises
        ShardUnavailable. Raises DiskFull, StorageError.
        """
        deadline = self._clock() + timeout
        while True:
            path = await asyncio.to_thread(self._store.path, object_hash)
            if path is not None:
                return path
            try:
                return await self._from_any(object_hash, await sources(), name or object_hash, progress)
            except PartialBusy:  # another process of this machine is fetching it into the same store
                await asyncio.sleep(RETRY_AFTER)
            except ShardUnavailable:
                if self._clock() >= deadline:
                    raise
                await asyncio.sleep(RETRY_AFTER)

    async def _from_any(self, object_hash: ShardHash, sources: Sources, name: str, progress: Progress | None) -> Path:
        reasons = []
        for peer in self._standings.usable(sources):
            try:
                path = await self._from_one(object_hash, peer, sources[peer], progress)
            except PeerError as error:
                error.peer = error.peer or peer
                self._standings.blame(error)
                reasons.append(str(error))
                continue
            self._standings.praise(peer)
            return path
        raise ShardUnavailable(name, "; ".join(reasons) or f"{len(sources)} peers known, none usable now")

    async def _from_one(
        self, object_hash: ShardHash, peer: PeerId, addresses: Sequence[str], progress: Progress | None
    ) -> Path:
        connection = await self._pool.connection(peer, addresses)
        chunks = await self._chunk_list(connection, object_hash)
        partial = await asyncio.to_thread(self._store.open_partial(object_hash, chunks).__enter__)
        try:
            await self._get_missing(connection, partial, progress)
            return await asyncio.to_thread(partial.commit)
        finally:
            await asyncio.to_thread(partial.__exit__, None, None, None)

    async def _chunk_list(self, connection: Connection, object_hash: ShardHash) -> ChunkList:
        answer = await connection.ask(GetChunkList(hash=object_hash), timeout=LIST_TIMEOUT)
        assert isinstance(answer.message, ChunkHashes)
        try:
            chunks = ChunkList.from_bytes(answer.message.size, answer.payload)
        except ValueError as error:
            raise ProtocolViolation(str(error), peer=connection.peer) from error
        if chunks.root != object_hash:
            raise IntegrityError(f"sent the chunk list of another object than {object_hash}", peer=connection.peer)
        return chunks

    async def _get_missing(self, connection: Connection, partial: PartialObject, progress: Progress | None) -> None:
        """Everything that is missing, some requests at a time. Raises the first PeerError."""
        missing = await asyncio.to_thread(partial.missing)
        todo = deque(
            range(start, min(start + CHUNKS_PER_REQUEST, run.stop))
            for run in runs(missing)
            for start in range(run.start, run.stop, CHUNKS_PER_REQUEST)
        )

        async def work() -> None:
            while todo:
                await self._get_run(connection, partial, todo.popleft(), progress)

        async with task_group() as group:
            for _ in range(min(REQUESTS_AT_ONCE, len(todo))):
                group.create_task(work())

    async def _get_run(
        self, connection: Connection, partial: PartialObject, run: range, progress: Progress | None
    ) -> None:
        request = GetChunks(hash=partial.object_hash, first=run.start, count=len(run))
        expected = deque(run)
        async with aclosing(connection.ask_many(request, timeout=CHUNK_TIMEOUT)) as answers:
            async for answer in answers:
                assert isinstance(answer.message, Chunk)
                index = answer.message.index
                if not expected or index != expected.popleft() or answer.more != bool(expected):
                    raise ProtocolViolation(f"chunk {index} comes unasked or out of order", peer=connection.peer)
                try:
                    await asyncio.to_thread(partial.write_chunk, index, answer.payload)
                except WrongBytes as error:
                    wrong = f"chunk {index} of {partial.object_hash} is wrong"
                    raise IntegrityError(wrong, peer=connection.peer) from error
                if progress is not None:
                    progress(chunk_range(index, partial.chunks.size)[1])
