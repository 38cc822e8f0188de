"""Reading objects back, each byte verified against the object's name before a caller sees it.

Disks rot and people edit files. A hash costs 6 GiB/s on one core, so nothing here is taken on trust.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from moehive.protocol.chunks import ChunkList, chunk_count, chunk_hash, chunk_range, object_root
from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.ids import ShardHash

from .base import NotHeld, ObjectSource
from .filesystem import LOCAL, FileSystem, storage_errors

# Chunk hashes kept in memory per source: those of 128 GiB of objects, about 12 MB. Beyond that, files are hashed again.
MAX_CACHED_HASHES = 1 << 17


def read_into(path: Path, buffer: memoryview, root: ShardHash, *, fs: FileSystem = LOCAL) -> None:
    """The whole file into `buffer`, which has the object's size; verified against `root` before this returns.

    Raises CorruptShard where size or bytes differ, StorageError where the file cannot be read.
    """
    size = len(buffer)
    with storage_errors("read", path):
        found = fs.size(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if found != size:  # before the buffer's pages are touched: a wrong file may be of any size
            raise CorruptShard(f"{path} has {found} bytes, object {root} has {size}; fetch or convert it again")
        fd = fs.open_read(path)
        try:
            count = fs.readinto(fd, buffer)
        finally:
            fs.close(fd)
    if count != size or object_root(buffer) != root:
        raise CorruptShard(f"{path} does not match its hash {root}; fetch or convert it again")


def read_verified(path: Path, size: int, root: ShardHash, *, fs: FileSystem = LOCAL) -> bytearray:
    """`read_into` a fresh, writable buffer of `size` bytes. Raises CorruptShard, StorageError."""
    buffer = bytearray(size)
    read_into(path, memoryview(buffer), root, fs=fs)
    return buffer


def read_object(source: ObjectSource, object_hash: ShardHash, size: int, *, fs: FileSystem = LOCAL) -> bytearray:
    """`read_verified` of an object of `source`, quarantining it there where it is corrupt.

    Raises NotHeld, CorruptShard, StorageError.
    """
    path = source.path(object_hash)
    if path is None:
        raise NotHeld(object_hash)
    try:
        return read_verified(path, size, object_hash, fs=fs)
    except CorruptShard as error:
        _take_out_of_view(source.quarantine, object_hash, error)
        raise


def hash_file(path: Path, *, fs: FileSystem = LOCAL) -> ChunkList:
    """The chunk list of a file, read with one chunk in memory. Raises StorageError."""
    hashes = []
    with storage_errors("read", path):
        fd = fs.open_read(path)
        try:
            size = fs.size(path) or 0
            for index in range(chunk_count(size)):
                start, count = chunk_range(index, size)
                hashes.append(chunk_hash(fs.pread(fd, count, start)))
        finally:
            fs.close(fd)
    return ChunkList(size, tuple(hashes))


class VerifiedFiles:
    """`chunk_list` and `read_range` of an ObjectSource, over files that `locate` finds.

    A wrong object is handed to `quarantine` before CorruptShard is raised. Keeps a bounded cache of chunk lists.
    """

    def __init__(
        self,
        locate: Callable[[ShardHash], Path | None],
        quarantine: Callable[[ShardHash], None],
        *,
        fs: FileSystem = LOCAL,
        max_hashes: int = MAX_CACHED_HASHES,
    ) -> None:
        self._locate = locate
        self._quarantine = quarantine
        self._fs = fs
        self._lists = _ChunkLists(max_hashes)

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See ObjectSource."""
        path = self._locate(object_hash)
        if path is None:
            raise NotHeld(object_hash)
        return self._lists.get(object_hash) or self.verify(object_hash)

    def verify(self, object_hash: ShardHash) -> ChunkList:
        """Hash the file again, whatever is cached. Raises what `chunk_list` raises."""
        path = self._locate(object_hash)
        if path is None:
            raise NotHeld(object_hash)
        chunks = hash_file(path, fs=self._fs)
        if chunks.root != object_hash:
            raise self._corrupt(object_hash, path)
        self._lists.put(object_hash, chunks)
        return chunks

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See ObjectSource."""
        chunks = self.chunk_list(object_hash)
        if offset < 0 or length < 0 or offset + length > chunks.size:
            raise ValueError(f"bytes {offset} to {offset + length} of object {object_hash} of {chunks.size} bytes")
        if length == 0:
            return b""
        path = self._locate(object_hash)
        if path is None:  # quarantined or deleted since the line above
            raise NotHeld(object_hash)
        start, data = self._read_chunks(path, chunks, offset, length)
        if data is None:
            raise self._corrupt(object_hash, path)
        aligned = start == offset and len(data) == length
        return data if aligned else data[offset - start : offset - start + length]

    def remember(self, chunks: ChunkList) -> None:
        """Cache the chunk list of an object whose every byte was just verified."""
        self._lists.put(chunks.root, chunks)

    def forget(self, object_hash: ShardHash) -> None:
        """Drop an object's chunk list: the file is gone."""
        self._lists.drop(object_hash)

    def _read_chunks(self, path: Path, chunks: ChunkList, offset: int, length: int) -> tuple[int, bytes | None]:
        """Offset and bytes of the chunks that cover a range; None for bytes that are wrong."""
        whole = chunk_range(0, chunks.size)[1]  # every chunk but the last has this size
        first, last = offset // whole, (offset + length - 1) // whole
        start = first * whole
        end = sum(chunk_range(last, chunks.size))
        with storage_errors("read", path):
            fd = self._fs.open_read(path)
            try:
                data = self._fs.pread(fd, end - start, start)
            finally:
                self._fs.close(fd)
        view = memoryview(data)
        right = all(
            chunks.matches(i, view[(i - first) * whole : (i - first + 1) * whole]) for i in range(first, last + 1)
        )
        return start, data if right else None

    def _corrupt(self, object_hash: ShardHash, path: Path) -> CorruptShard:
        self.forget(object_hash)
        error = CorruptShard(f"{path} does not match its hash {object_hash}; fetch or convert it again")
        _take_out_of_view(self._quarantine, object_hash, error)
        return error


def _take_out_of_view(quarantine: Callable[[ShardHash], None], object_hash: ShardHash, error: CorruptShard) -> None:
    """A quarantine that fails hides the object all the same; what the caller must learn is that the bytes are wrong."""
    try:
        quarantine(object_hash)
    except StorageError as failure:
        error.add_note(f"the file could not be moved away: {failure}")


class _ChunkLists:
    """Chunk lists by object, least recently used dropped first, bounded by the number of hashes."""

    def __init__(self, max_hashes: int) -> None:
        self._max = max_hashes
        self._count = 0
        self._lists: OrderedDict[ShardHash, ChunkList] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, object_hash: ShardHash) -> ChunkList | None:
        with self._lock:
            chunks = self._lists.get(object_hash)
            if chunks is not None:
                self._lists.move_to_end(object_hash)
            return chunks

    def put(self, object_hash: ShardHash, chunks: ChunkList) -> None:
        with self._lock:
            self._remove(object_hash)
            self._lists[object_hash] = chunks
            self._count += len(chunks.hashes)
            while self._count > self._max and len(self._lists) > 1:
                self._remove(next(iter(self._lists)))

    def drop(self, object_hash: ShardHash) -> None:
        with self._lock:
            self._remove(object_hash)

    def _remove(self, object_hash: ShardHash) -> None:
        chunks = self._lists.pop(object_hash, None)
        if chunks is not None:
            self._count -= len(chunks.hashes)
