"""One download on its way to becoming an object: verified chunks written in any order, then one atomic rename.

There is no record of which chunks are there. Opening the file hashes it, so nothing can contradict the bytes: a crash,
a torn write or a quarantined object leaves chunks that are either right or missing. The right ones are written once
more: whoever wrote them may have been killed just after a sync had failed, and then the kernel calls clean what never
reached the disk.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moehive.protocol.chunks import Buffer, ChunkList, chunk_range
from moehive.protocol.errors import StorageError
from moehive.protocol.ids import ShardHash

from .base import WrongBytes
from .filesystem import FileSystem, storage_errors
from .writing import ChunkWriter


class Home(Protocol):
    """What a partial object asks of the store it belongs to."""

    def open_file(self, object_hash: ShardHash, size: int) -> tuple[int | None, Path, bool]:
        """Reserve, create, lock: descriptor, path, and whether the file is new. Finished already: None and its path."""

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """Bytes of the finished object."""

    def publish(self, chunks: ChunkList, object_hash: ShardHash) -> Path:
        """Give synced bytes their final name, durably."""

    def discard(self, object_hash: ShardHash) -> None:
        """Remove the partial file."""


class PartialObject:
    """A download, as a context manager; leaving it keeps what was written, unless that is nothing.

    Methods block on the disk and may be called from several threads. Writes of one object take turns, because
    the disk does not get faster by more at a time; hashing does not. Where another process finished the
    object first, nothing is missing and `commit` returns its path.
    """

    def __init__(self, home: Home, object_hash: ShardHash, chunks: ChunkList, fs: FileSystem) -> None:
        self.object_hash = object_hash
        self.chunks = chunks
        self._home = home
        self._fs = fs
        self._writer = ChunkWriter(fs)
        self._lock = threading.Lock()
        self._syncing = threading.Lock()  # the file stays open while it is held; taken inside `_lock`
        self._unsynced = False
        self._named = False  # for sure: that the directory entry is durable, too
        self._verified: set[int] = set()
        self._final: Path | None = None
        self._path = Path()
        self._fd: int | None = None

    def __enter__(self) -> Self:
        """Reserve the space, lock the file and hash what it holds. Raises DiskFull, PartialBusy, StorageError."""
        self._fd, self._path, new = self._home.open_file(self.object_hash, self.chunks.size)
        if self._fd is None:
            self._final = self._path
            self._verified = set(range(len(self.chunks.hashes)))
            return self
        try:
            self._verified = set() if new else self._adopt_chunks(self._fd)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. A download that brought nothing gives its reservation back; any other can be resumed."""
        with self._lock:
            try:
                if self._fd is not None and self._final is None and not self._verified:
                    self._home.discard(self.object_hash)
            finally:
                self._close()

    def missing(self) -> tuple[int, ...]:
        """Indices of the chunks that are still to be written, ascending."""
        with self._lock:
            return tuple(i for i in range(len(self.chunks.hashes)) if i not in self._verified)

    def write_chunk(self, index: int, data: Buffer) -> None:
        """Verify `data` and write it. A chunk that is there already is left alone, so duplicates cost only their hash.

        Raises WrongBytes, with nothing written, where `data` is not chunk `index`: its sender is to blame. Raises
        DiskFull, StorageError; the chunk is then still missing, and the others are kept.
        """
        if not self.chunks.matches(index, data):
            raise WrongBytes(f"{len(data)} bytes are not chunk {index} of object {self.object_hash}")
        with self._lock:
            if index not in self._verified:
                fd, (offset, _) = self._open_fd(), chunk_range(index, self.chunks.size)
                with storage_errors("write", self._path):
                    self._writer.write(fd, data, offset)
                self._verified.add(index)
                self._unsynced = True

    def read_chunk(self, index: int) -> bytes | None:
        """A chunk, verified once more, for serving before the object is complete; None where it is missing.

        Goes on working after `commit`. Raises StorageError.
        """
        offset, length = chunk_range(index, self.chunks.size)
        with self._lock:
            if self._final is not None:
                return self._home.read_range(self.object_hash, offset, length)
            if index not in self._verified:
                return None
            with storage_errors("read", self._path):
                data = self._fs.pread(self._open_fd(), length, offset)
            if self.chunks.matches(index, data):
                return data
            self._verified.discard(index)  # the disk lost it: fetch it again
            return None

    def sync(self) -> None:
        """Make durable what was written so far, while writing goes on: less is left to `commit`, and to a power cut.

        Raises StorageError, as `commit` does.
        """
        with self._lock:
            fd = self._fd
            if fd is None or not self._unsynced:
                return
            self._unsynced = False
            self._syncing.acquire()
        try:
            try:
                with storage_errors("sync", self._path):
                    self._fs.fdatasync(fd)
                    if not self._named:
                        self._fs.fsync_dir(self._path.parent)
                self._named = True
            finally:
                self._syncing.release()  # before anybody closes the file
        except StorageError:
            self.discard()
            raise

    def commit(self) -> Path:
        """Make the object durable and visible; its final path. Every chunk must be there.

        Raises DiskFull, StorageError. If syncing the bytes fails, the download is discarded: after that the kernel may
        show pages as clean that never reached the disk, and no later sync would tell.
        """
        with self._lock:
            if self._final is not None:
                return self._final
            missing = len(self.chunks.hashes) - len(self._verified)
            if missing:
                raise StorageError(f"object {self.object_hash} cannot be finished: {missing} chunks are missing")
            self._sync(self._open_fd())
            self._final = self._home.publish(self.chunks, self.object_hash)
            self._close()
            return self._final

    def discard(self) -> None:
        """Remove what was downloaded and its reservation. A finished object is not touched. Raises StorageError."""
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        try:
            if self._fd is not None and self._final is None:
                self._home.discard(self.object_hash)
        finally:
            self._verified.clear()
            self._close()

    def _sync(self, fd: int) -> None:
        try:
            with storage_errors("sync", self._path):
                self._fs.fdatasync(fd)
        except StorageError:
            self._discard()
            raise

    def _adopt_chunks(self, fd: int) -> set[int]:
        """The chunks that are right. A region that cannot be read is as good as missing: writing may remap it.

        Raises DiskFull, StorageError.
        """
        right = set()
        for index in range(len(self.chunks.hashes)):
            offset, length = chunk_range(index, self.chunks.size)
            try:
                data = self._fs.pread(fd, length, offset)
            except OSError:
                continue
            if self.chunks.matches(index, data):
                with storage_errors("write", self._path):
                    self._fs.pwrite(fd, data, offset)
                    self._fs.start_writing(fd, offset, length)
                right.add(index)
        self._unsynced = bool(right)
        return right

    def _open_fd(self) -> int:
        if self._fd is None:
            raise StorageError(f"the download of object {self.object_hash} is closed")
        return self._fd

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with self._syncing:
                self._fs.close(fd)
