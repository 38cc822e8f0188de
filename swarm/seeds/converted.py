"""A converted directory as a permanent seed."""

from __future__ import annotations

from pathlib import Path

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import CorruptShard, SeedChanged, SeedError, StorageError
from moehive.protocol.ids import ShardHash
from moehive.swarm.store.directory import ConvertedDirectory


class ConvertedSeed:
    """See Seed. It may hold only some of its model's shards, or another version of the model with the same experts."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = ConvertedDirectory(directory)

    def offers(self, object_hash: ShardHash) -> bool:
        """See Seed."""
        return self._directory.path(object_hash) is not None

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See Seed."""
        try:
            return self._directory.chunk_list(object_hash)
        except StorageError as error:
            raise self._error(error) from error

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See Seed."""
        try:
            return self._directory.read_range(object_hash, offset, length)
        except StorageError as error:
            raise self._error(error) from error

    def refute(self, object_hash: ShardHash) -> SeedChanged:
        """See Seed."""
        path = self._directory.path(object_hash)
        self._directory.quarantine(object_hash)
        return SeedChanged(f"seed {self.name}: {path or object_hash} does not match its hash; convert it again")

    def close(self) -> None:
        """See Seed."""

    def _error(self, error: StorageError) -> SeedError:
        kind = SeedChanged if isinstance(error, CorruptShard) else SeedError
        return kind(f"seed {self.name}: {error}")
