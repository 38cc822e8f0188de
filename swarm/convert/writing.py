"""Writing one file so that its final name only ever stands for complete, synced bytes.

A file is written under `.partial-…` in the directory where it is to lie, checked for its size, synced, renamed. A kill
at any moment leaves partial files, which the next run removes. The caller syncs the directory: once for many files,
before it writes down that they exist.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_hash
from moehive.protocol.errors import DiskFull, StorageError
from moehive.protocol.units import format_size

PARTIAL = ".partial-"
BLOCK_SIZE = CHUNK_SIZE  # bytes read, hashed and written at a time: one chunk of the hash, which stays in the cache


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes to write; where they lie in an open file as well, the kernel can copy them from there."""

    data: memoryview
    descriptor: int | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """One chunk of a file to be written, in whole and in parts."""

    data: memoryview
    parts: list[Part]


class Disk:
    """The file system as far as it can say no. Tests put a small one in its place."""

    def free(self, directory: Path) -> int:
        """Bytes that may still be written below `directory`, which exists."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def write(self, descriptor: int, part: Part, done: int) -> int:
        """Write some of a part's bytes from `done` on; the number of bytes taken.

        Copying from page to page inside the kernel took a third of the time of writing from memory where it was
        measured (ext4 on a virtual disk, 2 GB).
        """
        if part.descriptor is not None:
            with contextlib.suppress(OSError):  # no sendfile between these files: write says what is wrong, if anything
                if sent := os.sendfile(descriptor, part.descriptor, part.offset + done, len(part.data) - done):
                    return sent
        return os.write(descriptor, part.data[done:])


def write_file(
    path: Path, content: Generator[Block], size: int, disk: Disk, written: Callable[[int], None] | None = None
) -> ChunkList:
    """Write blocks of BLOCK_SIZE bytes (the last may be shorter) to `path`, atomically; return their hashes.

    `content` is closed before the wait for the disk; `written` is told the bytes of each block. Raises DiskFull,
    StorageError; then no partial file is left.
    """
    partial = path.with_name(PARTIAL + path.name)
    hashes: list[bytes] = []
    total = 0
    with storage_errors(path, disk), _removed_on_error(partial):
        with partial.open("wb", buffering=0) as file:
            with contextlib.closing(content):
                for block in content:
                    hashes.append(chunk_hash(block.data))
                    count = sum(_write(file.fileno(), part, disk) for part in block.parts)
                    total += count
                    if written:
                        written(count)
            assert total == size, (path, total, size)
            if os.fstat(file.fileno()).st_size != size:
                raise StorageError(f"{path}: {size} bytes were written, the file has another size")
            os.fsync(file.fileno())
        partial.rename(path)
    return ChunkList(size, tuple(hashes))


def write_bytes(path: Path, data: bytes, disk: Disk) -> None:
    """`write_file` for content in memory, with its name durable."""
    view = memoryview(data)
    chunks = (view[at : at + BLOCK_SIZE] for at in range(0, len(view), BLOCK_SIZE))
    write_file(path, (Block(chunk, [Part(chunk)]) for chunk in chunks), len(data), disk)
    with storage_errors(path, disk):
        sync_directory(path.parent)


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
            f"{path}: the disk is full ({format_size(free)} are free); make room and run the same command again"
        ) from error


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(descriptor: int, part: Part, disk: Disk) -> int:
    done = 0
    while done < len(part.data):
        done += disk.write(descriptor, part, done)
    return done
