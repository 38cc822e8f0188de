"""Content hashes: BLAKE3 over fixed 1 MiB chunks, and one root over the list of chunk hashes.

Every stored object (shard, asset, manifest) is named by its root. A receiver first gets the chunk list, checks it
against the root, then verifies each chunk alone, from whichever peer it came: a bad chunk names its sender.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Self

from blake3 import blake3

from .ids import ShardHash

CHUNK_SIZE = 1 << 20  # bytes; fixed by the format
HASH_SIZE = 32  # bytes
_ROOT_CONTEXT = "moehive 2026 object root v1"  # domain separation: a root is never mistaken for a chunk hash

Buffer = bytes | bytearray | memoryview


def chunk_count(size: int) -> int:
    """Number of chunks of an object of `size` bytes (an empty object has none)."""
    return -(-size // CHUNK_SIZE)


def chunk_range(index: int, size: int) -> tuple[int, int]:
    """Offset and length in bytes of chunk `index` of an object of `size` bytes."""
    offset = index * CHUNK_SIZE
    assert 0 <= offset < size, (index, size)
    return offset, min(CHUNK_SIZE, size - offset)


def chunk_hash(data: Buffer) -> bytes:
    """BLAKE3-256 of one chunk."""
    return blake3(data).digest()


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The chunk hashes of one object of `size` bytes."""

    size: int
    hashes: tuple[bytes, ...]

    @property
    def root(self) -> ShardHash:
        """The object's name: keyed BLAKE3 of its size and its chunk hashes."""
        hasher = blake3(derive_key_context=_ROOT_CONTEXT)
        hasher.update(self.size.to_bytes(8, "big"))
        hasher.update(b"".join(self.hashes))
        return ShardHash(hasher.hexdigest())

    def matches(self, index: int, data: Buffer) -> bool:
        """Whether `data` is chunk `index`."""
        return len(data) == chunk_range(index, self.size)[1] and chunk_hash(data) == self.hashes[index]

    def to_bytes(self) -> bytes:
        """The hashes, concatenated."""
        return b"".join(self.hashes)

    @classmethod
    def from_bytes(cls, size: int, data: Buffer) -> Self:
        """Inverse of `to_bytes`. Raises ValueError where the length does not fit `size`."""
        if len(data) != chunk_count(size) * HASH_SIZE:
            raise ValueError(f"{len(data)} bytes of chunk hashes for an object of {size} bytes")
        return cls(size, tuple(bytes(data[i : i + HASH_SIZE]) for i in range(0, len(data), HASH_SIZE)))

    @classmethod
    def of(cls, data: Buffer) -> Self:
        """The chunk list of an object in memory."""
        view = memoryview(data)
        return cls(len(view), tuple(chunk_hash(view[i : i + CHUNK_SIZE]) for i in range(0, len(view), CHUNK_SIZE)))

    @classmethod
    def of_file(cls, file: BinaryIO) -> Self:
        """The chunk list of an open binary file, read from its current position with one reused buffer."""
        buffer = memoryview(bytearray(CHUNK_SIZE))
        size, hashes = 0, []
        while count := _read_full(file, buffer):
            hashes.append(chunk_hash(buffer[:count]))
            size += count
        return cls(size, tuple(hashes))


def object_root(data: Buffer) -> ShardHash:
    """The name of an object in memory."""
    return ChunkList.of(data).root


def runs(indices: Iterable[int]) -> Sequence[range]:
    """Ascending chunk indices as maximal runs of neighbours."""
    out: list[range] = []
    for index in indices:
        if out and out[-1].stop == index:
            out[-1] = range(out[-1].start, index + 1)
        else:
            out.append(range(index, index + 1))
    return out


def _read_full(file: BinaryIO, buffer: memoryview) -> int:
    """Fill `buffer` as far as the file reaches; the number of bytes read."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled
