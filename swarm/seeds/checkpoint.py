"""The original checkpoint as a permanent seed: shards cut out of its files exactly as the converter cuts them.

It plans the conversion again, from headers alone, and carries out only the parts that are asked for. Nothing of the
plan is believed: whoever has no chunk list gets one only after the whole shard was rebuilt and compared with its hash
in the manifest. The manifest need not say where its model came from: whoever names a seed may be wrong, and only the
bytes decide.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_hash
from moehive.protocol.errors import CheckpointError, SeedChanged, SeedError
from moehive.protocol.ids import ShardHash
from moehive.protocol.manifest import Manifest
from moehive.swarm.convert.layout import ConversionPlan, PlannedFile
from moehive.swarm.convert.reading import SourceReader, blocks, read_range
from moehive.swarm.threads import is_unwanted

STEP = 16 << 20  # bytes rebuilt at a time, where a shard is not kept
REBUILDS = 2  # shards being rebuilt at a time


class CheckpointSeed:
    """See Seed. `files` reads the checkpoint that `plan` was made of; it is closed with the seed.

    Up to `keep_bytes` bytes of rebuilt shards stay in memory until they were read: a source that is far away is then
    read once, not once to verify it and once to use it. Raises SeedChanged for the checkpoint of another model.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        plan: ConversionPlan,
        files: SourceReader,
        *,
        keep_bytes: int,
    ) -> None:
        self.name = name
        _check_model(name, manifest, plan)
        planned = {file.file: file for file in plan.files}
        self._planned = {
            shard.hash: planned[shard.file]
            for shard in manifest.shards
            if shard.file in planned and planned[shard.file].size == shard.size
        }
        self._files = files
        self._lists: dict[ShardHash, ChunkList] = {}
        self._changed: dict[ShardHash, str] = {}  # why an object is not offered any more
        self._images = _Images(keep_bytes)
        self._rebuilds = threading.Semaphore(REBUILDS)
        self._locks: dict[ShardHash, threading.Lock] = {}

    def offers(self, object_hash: ShardHash) -> bool:
        """See Seed."""
        return object_hash in self._planned and object_hash not in self._changed

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See Seed. The first call rebuilds the shard."""
        planned = self._planned.get(object_hash)
        if planned is None:
            raise SeedError(f"seed {self.name}: it has no object {object_hash}")
        with self._locks.setdefault(object_hash, threading.Lock()):
            self._check_unchanged(object_hash)
            if object_hash not in self._lists:
                with self._rebuilds:
                    self._lists[object_hash] = self._rebuild(object_hash, planned)
        return self._lists[object_hash]

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See Seed."""
        self._check_unchanged(object_hash)
        data = self._images.take(object_hash, offset, length)
        if data is None:
            data = bytearray(length)
            try:
                read_range(self._planned[object_hash], self._files, offset, memoryview(data))
            except CheckpointError as error:
                raise SeedError(f"seed {self.name}: {error}") from error
        chunks, view = self._lists.get(object_hash), memoryview(data)
        for at in range(0, length, CHUNK_SIZE):
            if chunks and not chunks.matches((offset + at) // CHUNK_SIZE, view[at : at + CHUNK_SIZE]):
                raise self.refute(object_hash)
        return bytes(data)

    def refute(self, object_hash: ShardHash) -> SeedChanged:
        """See Seed."""
        planned = self._planned[object_hash]
        files = sorted({span.file for span in planned.spans()} | {piece.span.file for piece in planned.pieces})
        self._changed[object_hash] = (
            f"seed {self.name}: {' and '.join(files) or 'config.json or the index'} changed since the model was "
            f"converted: {planned.file} made of it is not what the manifest names; name the revision that was converted"
        )
        return SeedChanged(self._changed[object_hash])

    def close(self) -> None:
        """See Seed."""
        self._files.close()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _check_unchanged(self, object_hash: ShardHash) -> None:
        if object_hash in self._changed:
            raise SeedChanged(self._changed[object_hash])

    def _rebuild(self, object_hash: ShardHash, planned: PlannedFile) -> ChunkList:
        keep = planned.size <= self._images.limit
        buffer = bytearray(max(planned.size, 1) if keep else STEP)
        hashes: list[bytes] = []
        try:
            for block in blocks(planned, self._files, memoryview(buffer)):
                if is_unwanted():
                    raise SeedError(f"seed {self.name}: given up")
                hashes += [chunk_hash(block.data[at : at + CHUNK_SIZE]) for at in range(0, len(block.data), CHUNK_SIZE)]
        except CheckpointError as error:
            raise SeedError(f"seed {self.name}: {error}") from error
        chunks = ChunkList(planned.size, tuple(hashes))
        if chunks.root != object_hash:
            raise self.refute(object_hash)
        if keep:
            self._images.put(object_hash, buffer)
        return chunks


class _Images:
    """Rebuilt shards that were verified and not read yet; `limit` bytes, the oldest given up first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._images: OrderedDict[ShardHash, bytearray] = OrderedDict()
        self._unread: dict[ShardHash, int] = {}

    def put(self, object_hash: ShardHash, data: bytearray) -> None:
        with self._lock:
            self._images[object_hash], self._unread[object_hash] = data, len(data)
            while sum(map(len, self._images.values())) > self.limit:
                self._drop(next(iter(self._images)))

    def take(self, object_hash: ShardHash, offset: int, length: int) -> bytearray | None:
        with self._lock:
            data = self._images.get(object_hash)
            if data is None:
                return None
            self._unread[object_hash] -= length
            if self._unread[object_hash] <= 0:
                self._drop(object_hash)
            return data[offset : offset + length]

    def _drop(self, object_hash: ShardHash) -> None:
        del self._images[object_hash], self._unread[object_hash]


def _check_model(name: str, manifest: Manifest, plan: ConversionPlan) -> None:
    fields: Iterable[str] = ("model_type", "hidden_size", "intermediate_size", "num_experts", "moe_layers")
    for field in fields:
        found, wanted = getattr(plan.model, field), getattr(manifest.model, field)
        if found != wanted:
            raise SeedChanged(
                f"seed {name} is the checkpoint of another model than {manifest.model.name}: its {field} is {found}, "
                f"not {wanted}"
            )
