"""Where downloaded chunks go: a store's partial object, or a buffer in memory. Both verify each chunk first."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moehive.protocol.bits import Bits, from_indices
from moehive.protocol.chunks import Buffer, ChunkList, chunk_range
from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ShardHash
from moehive.swarm.store.base import WrongBytes
from moehive.swarm.store.partial import PartialObject


class ObjectStore(Protocol):
    """What is asked of a store that objects are downloaded into."""

    def path(self, object_hash: ShardHash) -> Path | None:
        """The object's file, complete and verified; None where it is not held."""

    def open_partial(self, object_hash: ShardHash, chunks: ChunkList) -> PartialObject:
        """A download of it; entering raises DiskFull, PartialBusy, StorageError."""


class Sink(Protocol):
    """Takes chunks, in any order and from any thread."""

    chunks: ChunkList

    def write_chunk(self, index: int, data: Buffer) -> None:
        """Verify and keep it. Raises WrongBytes, with nothing kept; LocalError where it cannot be kept."""


class MemorySink:
    """Chunks go to their place in `buffer`. Raises ManifestError where that has not the object's size."""

    def __init__(self, chunks: ChunkList, buffer: memoryview) -> None:
        if buffer.nbytes != chunks.size:
            raise ManifestError(f"an object has {chunks.size} bytes, {buffer.nbytes} were expected")
        self.chunks = chunks
        self._buffer = buffer.cast("B")

    def write_chunk(self, index: int, data: Buffer) -> None:
        """See Sink. A chunk that comes twice is written twice: it has the same bytes."""
        if not self.chunks.matches(index, data):
            raise WrongBytes(f"{len(data)} bytes are not chunk {index}")
        offset, length = chunk_range(index, self.chunks.size)
        self._buffer[offset : offset + length] = data


def missing_of(partial: PartialObject) -> Bits:
    """What a partial object still lacks."""
    return from_indices(partial.missing())
