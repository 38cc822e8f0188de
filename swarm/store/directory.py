"""A converted directory as a source of objects: files under their own names, found by hash through the manifest.

Read-only: it never writes, renames or deletes there, because the directory belongs to the user. A file that turns out
wrong is only hidden, for as long as this object lives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import ManifestError, StorageError
from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.limits import MAX_MANIFEST_BYTES
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, Manifest

from .filesystem import LOCAL, FileSystem, storage_errors
from .reading import VerifiedFiles


class ConvertedDirectory:
    """An ObjectSource over `path`, which `moehive convert` wrote. The manifest is an object too, named by the model id.

    Raises ManifestError where there is no manifest or it is not valid, StorageError where it cannot be read.
    """

    def __init__(self, path: Path, *, fs: FileSystem = LOCAL) -> None:
        self.root = path
        self._fs = fs
        self.manifest = Manifest.from_bytes(_manifest_bytes(path / MANIFEST_NAME, fs))
        _check_untouched(path, self.manifest.model_id)
        self._files: Mapping[ShardHash, Path] = {
            ShardHash(self.manifest.model_id): path / MANIFEST_NAME,
            **{shard.hash: path / shard.file for shard in self.manifest.shards},
        }
        self._bad: set[ShardHash] = set()
        self._reader = VerifiedFiles(self.path, self.quarantine, fs=fs)

    @property
    def model_id(self) -> ModelId:
        """The model's id: the root hash of the manifest."""
        return self.manifest.model_id

    def path(self, object_hash: ShardHash) -> Path | None:
        """See ObjectSource."""
        file = self._files.get(object_hash)
        if file is None or object_hash in self._bad:
            return None
        try:
            return file if self._fs.size(file) is not None else None
        except OSError:  # an unreadable directory holds nothing that could be offered
            return None

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See ObjectSource."""
        return self._reader.chunk_list(object_hash)

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See ObjectSource."""
        return self._reader.read_range(object_hash, offset, length)

    def quarantine(self, object_hash: ShardHash) -> None:
        """See ObjectSource. The file stays where it is."""
        self._bad.add(object_hash)

    def verify(
        self, objects: Iterable[ShardHash] | None = None, progress: Callable[[int], None] | None = None
    ) -> Mapping[ShardHash, StorageError]:
        """Hash the files of `objects` (default: all, and the manifest); what is wrong with each that is not right.

        `progress` is called after each file with its size in bytes. Objects found wrong are quarantined.
        """
        sizes = {shard.hash: shard.size for shard in self.manifest.shards}
        faults: dict[ShardHash, StorageError] = {}
        for object_hash in self._files if objects is None else objects:
            try:
                self._reader.verify(object_hash)
            except StorageError as error:  # NotHeld, CorruptShard, unreadable: each is the answer for this file
                faults[object_hash] = error
            if progress is not None:
                progress(sizes.get(object_hash, 0))
        return faults


def _check_untouched(path: Path, model_id: ModelId) -> None:
    """The conversion reported which model it wrote: an edited manifest would be another one, consistent in itself."""
    try:
        recorded = json.loads((path / REPORT_NAME).read_bytes()).get("modelId")
    except (OSError, ValueError, AttributeError):
        return  # laid out from the swarm, where the id came first; or damaged, which `moehive inspect` reports
    if recorded != model_id:
        raise ManifestError(f"{path / MANIFEST_NAME} was changed after the conversion; convert again")


def _manifest_bytes(path: Path, fs: FileSystem) -> bytes:
    with storage_errors("read", path):
        size = fs.size(path)
        if size is None:
            raise ManifestError(f"{path} does not exist; is {path.parent} a directory that `moehive convert` wrote?")
        if size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path} has {size} bytes, at most {MAX_MANIFEST_BYTES} are read")
        fd = fs.open_read(path)
        try:
            return fs.pread(fd, size, 0)
        finally:
            fs.close(fd)
