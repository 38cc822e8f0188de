"""Objects that are being downloaded, for serving what is there of them. Safe to use from any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moehive.protocol.bits import Bits, from_indices, full
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range
from moehive.protocol.ids import ShardHash
from moehive.swarm.store.partial import PartialObject


class Partials:
    """Open downloads by object. Only verified chunks leave, verified once more on their way out."""

    def __init__(self) -> None:
        self._open: dict[ShardHash, PartialObject] = {}
        self._lock = threading.Lock()

    @contextmanager
    def offered(self, partial: PartialObject) -> Iterator[None]:
        """Offer a download to others while the body runs."""
        with self._lock:
            self._open[partial.object_hash] = partial
        try:
            yield
        finally:
            with self._lock:
                del self._open[partial.object_hash]

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        """The object's chunk hashes; None where it is not being downloaded."""
        partial = self._get(object_hash)
        return partial.chunks if partial else None

    def have(self, object_hash: ShardHash) -> Bits:
        """The chunks that can be read."""
        partial = self._get(object_hash)
        return full(len(partial.chunks.hashes)) & ~from_indices(partial.missing()) if partial else 0

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes | None:
        """One whole chunk; None where it is not there, or for other ranges. Blocks on the disk. Raises StorageError."""
        partial = self._get(object_hash)
        index, rest = divmod(offset, CHUNK_SIZE)
        if partial is None or rest or index >= len(partial.chunks.hashes):
            return None
        return partial.read_chunk(index) if length == chunk_range(index, partial.chunks.size)[1] else None

    def _get(self, object_hash: ShardHash) -> PartialObject | None:
        with self._lock:
            return self._open.get(object_hash)
