"""Reading what peers answer about objects: checked against what was asked. Pure."""

from __future__ import annotations

from moehive.protocol.bits import from_bitmap, indices
from moehive.protocol.chunks import ChunkList, chunk_count
from moehive.protocol.errors import IntegrityError, ProtocolViolation
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import Chunk, ChunkHashes, Have

Payload = bytes | bytearray


def read_chunk_list(reply: ChunkHashes, payload: Payload, object_hash: ShardHash, peer: PeerId) -> ChunkList:
    """The chunk list, if it is that of the object. Raises ProtocolViolation, IntegrityError."""
    try:
        chunks = ChunkList.from_bytes(reply.size, payload)
    except ValueError as error:
        raise ProtocolViolation(str(error), peer=peer) from error
    if chunks.root != object_hash:
        raise IntegrityError(f"sent the chunk list of another object than {object_hash}", peer=peer)
    return chunks


def read_have(reply: Have, payload: Payload, peer: PeerId) -> frozenset[int] | None:
    """The chunks that the peer claims to have; None for all of them. Raises ProtocolViolation."""
    try:
        bits = from_bitmap(payload, 0 if reply.complete else chunk_count(reply.size))
    except ValueError as error:
        raise ProtocolViolation(str(error), peer=peer) from error
    return None if reply.complete else frozenset(indices(bits))


class ExpectedChunks:
    """The chunks that are still to come in answer to one request, in order."""

    def __init__(self, first: int, count: int) -> None:
        self._next = first
        self._stop = first + count

    def accept(self, chunk: Chunk, *, more: bool, peer: PeerId) -> None:
        """Count one that came. Raises ProtocolViolation for any but the next one."""
        expected = self._next < self._stop and chunk.index == self._next
        self._next += 1
        if not expected or more is not (self._next < self._stop):
            raise ProtocolViolation(f"chunk {chunk.index} comes unasked or out of order", peer=peer)
