"""Shard files into memory, verified.

Bytes are hashed chunk by chunk while they are read, and handed out only if all match: what is verified is what is
used, there is no second read. Owns the placement in memory (tensors.py, `empty_bytes`); where files lie is the source's
matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from moehive.protocol.chunks import ChunkList, chunk_count, chunk_hash, chunk_range
from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.manifest import Manifest, ShardEntry, TensorEntry
from moehive.swarm.store.base import NotHeld, ObjectSource

from .tensors import empty_bytes, first_offset, tensors_of


def read_tensors(source: ObjectSource, manifest: Manifest, shard: ShardEntry) -> dict[str, Tensor]:
    """A shard's tensors in their stored dtype, by name, as views of one fresh aligned buffer.

    Raises NotHeld, StorageError; CorruptShard, after which `source` no longer offers the object.
    """
    path = source.path(shard.hash)
    if path is None:
        raise NotHeld(shard.hash)
    table = tensor_table(manifest, shard)
    try:
        return tensors_of(read_verified(path, shard, first_offset(table)), table)
    except CorruptShard:
        source.quarantine(shard.hash)
        raise


def tensor_table(manifest: Manifest, shard: ShardEntry) -> Mapping[str, TensorEntry]:
    """One shard's part of the tensor table, in file order; two shards of equal bytes are kept apart."""
    table = manifest.tensors_of.get(shard.hash, {})
    return {name: entry for name, entry in table.items() if manifest.shards[entry.shard].file == shard.file}


def read_verified(path: Path, shard: ShardEntry, aligned_offset: int = 0) -> Tensor:
    """The file's bytes: uint8 [size], the byte at `aligned_offset` on a 64-byte boundary.

    Raises CorruptShard, StorageError.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            if size != shard.size:  # before allocating
                raise CorruptShard(f"{path} has {size} bytes, not {shard.size}; fetch or convert it again")
            file.seek(0)
            buffer = empty_bytes(size, aligned_offset)
            found = _read_hashed(file, buffer.numpy().data)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if found.root != shard.hash:
        raise _corrupt(path)
    return buffer


def verify_files(root: Path, shards: Iterable[ShardEntry]) -> None:
    """Hash each of `shards`' files below `root`, with one small buffer. Raises CorruptShard, StorageError."""
    for shard in shards:
        path = root / shard.file
        try:
            with path.open("rb", buffering=0) as file:
                found = ChunkList.of_file(file)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; fetch or convert it again") from error
        if found.root != shard.hash:
            raise _corrupt(path)


def _read_hashed(file: BinaryIO, buffer: memoryview) -> ChunkList:
    """Fill `buffer` and hash it, each chunk while it is in cache; a file that ends early gives other hashes."""
    hashes = []
    for index in range(chunk_count(len(buffer))):
        start, size = chunk_range(index, len(buffer))
        chunk = buffer[start : start + size]
        filled = 0
        while filled < size and (count := file.readinto(chunk[filled:])):  # type: ignore[attr-defined]
            filled += count
        hashes.append(chunk_hash(chunk[:filled]))
    return ChunkList(len(buffer), tuple(hashes))


def _corrupt(path: Path) -> CorruptShard:
    return CorruptShard(f"{path} does not match its hash in the manifest; fetch or convert it again")
