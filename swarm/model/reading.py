"""Shard files into memory, verified.

What is verified is what is used, there is no second read. Owns the placement in memory (tensors.py, `empty_bytes`);
where files lie is the source's matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from moehive.protocol.errors import CorruptShard
from moehive.protocol.manifest import Manifest, ShardEntry, TensorEntry
from moehive.swarm.store.base import NotHeld, ObjectSource
from moehive.swarm.store.reading import hash_file, read_into

from .buffers import Allocate
from .tensors import empty_bytes, first_offset, tensors_of


def read_tensors(
    source: ObjectSource, manifest: Manifest, shard: ShardEntry, *, allocate: Allocate = empty_bytes
) -> dict[str, Tensor]:
    """A shard's tensors in their stored dtype, by name, as views of one aligned buffer that `allocate` makes.

    Raises NotHeld, StorageError; CorruptShard, after which `source` no longer offers the object.
    """
    path = source.path(shard.hash)
    if path is None:
        raise NotHeld(shard.hash)
    table = tensor_table(manifest, shard)
    try:
        return tensors_of(read_verified(path, shard, first_offset(table), allocate=allocate), table)
    except CorruptShard:
        source.quarantine(shard.hash)
        raise


def tensor_table(manifest: Manifest, shard: ShardEntry) -> Mapping[str, TensorEntry]:
    """One shard's part of the tensor table, in file order; two shards of equal bytes are kept apart."""
    table = manifest.tensors_of.get(shard.hash, {})
    return {name: entry for name, entry in table.items() if manifest.shards[entry.shard].file == shard.file}


def read_verified(
    path: Path, shard: ShardEntry, aligned_offset: int = 0, *, allocate: Allocate = empty_bytes
) -> Tensor:
    """The file's bytes: uint8 [size], the byte at `aligned_offset` on a 64-byte boundary.

    Raises CorruptShard, StorageError.
    """
    buffer = allocate(shard.size, aligned_offset)  # takes no memory before it is written
    read_into(path, buffer.numpy().data, shard.hash)
    return buffer


def verify_files(root: Path, shards: Iterable[ShardEntry]) -> None:
    """Hash each of `shards`' files below `root`, one chunk in memory at a time. Raises CorruptShard, StorageError."""
    for shard in shards:
        path = root / shard.file
        if hash_file(path).root != shard.hash:
            raise CorruptShard(f"{path} does not match its hash in the manifest; fetch or convert it again")
