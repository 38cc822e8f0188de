"""What is answered to questions about objects, whichever carrier they come by: blocking, one answer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from moehive.protocol.bits import Bits, full, to_bitmap
from moehive.protocol.chunks import ChunkList, chunk_count, chunk_range
from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import ShardHash
from moehive.protocol.messages import Chunk, ChunkHashes, GetChunkList, GetChunks, GetHave, Have
from moehive.swarm.rpc.server import Refusal


class Shelf(Protocol):
    """The objects that may be supplied. Methods block on the disk and may be called from any thread."""

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        """The chunk list of an object; None where it is not held."""

    def have(self, object_hash: ShardHash) -> Bits:
        """Which of an object's chunks can be read now; more than it has where it is complete."""

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes | None:
        """Verified bytes of an object, one whole chunk; None where they are not held."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply; `more` of them to the same request follow."""

    message: Message
    payload: bytes
    more: bool = False


def answers(shelf: Shelf, request: Message) -> Iterator[Answer]:
    """The replies to one request of /moehive/shard. Raises Refusal; LocalError where the disk fails."""
    match request:
        case GetChunkList(hash=object_hash):
            chunks = _list(shelf, object_hash)
            yield Answer(ChunkHashes(size=chunks.size), chunks.to_bytes())
        case GetHave(hash=object_hash):
            yield _have(shelf, object_hash)
        case GetChunks():
            yield from _chunks(shelf, request)
        case _:
            raise Refusal(RefusalCode.BAD_REQUEST, f"{type(request).__name__} is not answered here")


def _have(shelf: Shelf, object_hash: ShardHash) -> Answer:
    size = _list(shelf, object_hash).size
    every = full(chunk_count(size))
    have = shelf.have(object_hash) & every
    complete = have == every
    return Answer(Have(size=size, complete=complete), b"" if complete else to_bitmap(have, chunk_count(size)))


def _chunks(shelf: Shelf, request: GetChunks) -> Iterator[Answer]:
    chunks = _list(shelf, request.hash)
    stop = request.first + request.count
    if stop > chunk_count(chunks.size):
        raise Refusal(RefusalCode.BAD_REQUEST, f"the object has {chunk_count(chunks.size)} chunks")
    for index in range(request.first, stop):
        data = shelf.read_range(request.hash, *chunk_range(index, chunks.size))
        if data is None:
            raise _not_held(request.hash)
        yield Answer(Chunk(index=index), data, more=index + 1 < stop)


def _list(shelf: Shelf, object_hash: ShardHash) -> ChunkList:
    chunks = shelf.chunk_list(object_hash)
    if chunks is None:
        raise _not_held(object_hash)
    return chunks


def _not_held(object_hash: ShardHash) -> Refusal:
    return Refusal(RefusalCode.NOT_HELD, f"object {object_hash} is not held here")
