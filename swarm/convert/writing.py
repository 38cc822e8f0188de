"""Writing one file so that its final name only ever stands for complete, synced bytes.

A file is written under `.partial-…` in the directory where it is to lie, checked for its size, synced, renamed; then
the directory is synced. A kill at any moment leaves partial files, which the next run removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_hash
from moehive.protocol.errors import DiskFull, StorageError

PARTIAL = ".partial-"
BLOCK_SIZE = 4 * CHUNK_SIZE  # bytes read, hashed and written at a time; a multiple of the hash's chunk


class Disk:
    """The file system as far as it can say no. Tests put a small one in its place."""

    def free(self, directory: Path) -> int:
        """Bytes that may still be written below `directory`, which exists."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; the number of bytes taken."""
        return os.write(descriptor, data)


def write_file(
    path: Path, content: Iterable[memoryview], size: int, disk: Disk, written: Callable[[int], None] | None = None
) -> ChunkList:
    """Write blocks of BLOCK_SIZE (the last may be shorter) to `path`, atomically and durably; return their hashes.

    `written` is told the bytes of each block. Raises DiskFull, StorageError; then no partial file is left.
    """
    partial = path.with_name(PARTIAL + path.name)
    hashes: list[bytes] = []
    total = 0
    with storage_errors(path, disk), _removed_on_error(partial):
        with partial.open("wb", buffering=0) as file:
            for block in content:
                hashes += [chunk_hash(block[at : at + CHUNK_SIZE]) for at in range(0, len(block), CHUNK_SIZE)]
                _write_all(file.fileno(), block, disk)
                total += len(block)
                if written:
                    written(len(block))
            assert total == size, (path, total, size)
            if os.fstat(file.fileno()).st_size != size:
                raise StorageError(f"{path}: {size} bytes were written, the file has another size")
            os.fsync(file.fileno())
        partial.rename(path)
        sync_directory(path.parent)
    return ChunkList(size, tuple(hashes))


def write_bytes(path: Path, data: bytes, disk: Disk) -> None:
    """`write_file` for content in memory."""
    view = memoryview(data)
    write_file(path, (view[at : at + BLOCK_SIZE] for at in range(0, len(view), BLOCK_SIZE)), len(data), disk)


def make_directory(path: Path, disk: Disk) -> None:
    """Create a directory and its parents, durably."""
    if path.is_dir():
        return
    make_directory(path.parent, disk)
    with storage_errors(path, disk):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def storage_errors(path: Path, disk: Disk) -> Iterator[None]:
    """Turn OSError into DiskFull or StorageError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{path} cannot be accessed: {error}") from error
        free = disk.free(path.parent)
        raise DiskFull(
            f"{path}: the disk is full ({free} bytes are free); make room and run the same command again"
        ) from error


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, data: memoryview, disk: Disk) -> None:
    done = 0
    while done < len(data):
        done += disk.write(descriptor, data[done:])
