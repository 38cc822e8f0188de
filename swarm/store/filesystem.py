"""The few file-system calls the store makes, behind a seam, and their translation into moehive's errors.

The store's promises are about what survives a power cut and a full disk. Those cannot be produced on demand on a real
disk, so everything that changes or reads a file goes through `FileSystem`; tests put an implementation there that
loses, tears and reorders what was not synced. No policy and no paths of ours live here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from moehive.protocol.chunks import Buffer
from moehive.protocol.errors import DiskFull, StorageError

_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileSystem(Protocol):
    """POSIX calls, raising OSError as POSIX would. Descriptors are plain integers, offsets and sizes are bytes."""

    def mkdir(self, path: Path) -> bool:
        """Create one directory; False where it exists."""

    def listdir(self, path: Path) -> list[str]:
        """Names in a directory, in any order."""

    def size(self, path: Path) -> int | None:
        """Size of the regular file at `path`; None where there is none."""

    def open_read(self, path: Path) -> int:
        """Open an existing file for reading."""

    def open_write(self, path: Path) -> int:
        """Open a file for reading and writing, created empty where it does not exist."""

    def close(self, fd: int) -> None:
        """Close, which also releases the descriptor's lock."""

    def try_lock(self, fd: int) -> bool:
        """Take the exclusive advisory lock (flock) without waiting; False where another descriptor holds it."""

    def lock(self, fd: int) -> None:
        """Take the exclusive advisory lock, waiting for it."""

    def allocate(self, fd: int, size: int) -> None:
        """Make the file exactly `size` bytes with every block reserved; ENOSPC here is cheaper than in the middle."""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data`."""

    def pwrite_direct(self, fd: int, data: memoryview, offset: int) -> bool:
        """Write all of `data` past the page cache, not durable for that. Nobody else uses the descriptor meanwhile.

        False where the file system does not do that, or not from this address: some of it may have been written then.
        """

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Read `length` bytes; fewer only at the end of the file."""

    def readinto(self, fd: int, buffer: memoryview) -> int:
        """Fill `buffer` from the start of the file; the count is short only at its end."""

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """Have the bytes of a range written to the disk soon: a hint, so that `fdatasync` finds little left to do."""

    def fdatasync(self, fd: int) -> None:
        """Make the file's bytes and size durable."""

    def fsync_dir(self, path: Path) -> None:
        """Make the directory's entries durable."""

    def rename(self, source: Path, target: Path) -> None:
        """Move atomically within the device, replacing `target`."""

    def unlink(self, path: Path) -> None:
        """Remove a name; one that is gone already is fine."""

    def modified(self, path: Path) -> float | None:
        """When the file was last written to or touched, in seconds since the epoch; None where there is none."""

    def touch(self, path: Path, seconds: float) -> None:
        """Set what `modified` says. Never durable by itself."""


class LocalFileSystem:
    """The operating system's."""

    def mkdir(self, path: Path) -> bool:
        """See FileSystem."""
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        return True

    def listdir(self, path: Path) -> list[str]:
        """See FileSystem."""
        return os.listdir(path)

    def size(self, path: Path) -> int | None:
        """See FileSystem."""
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def open_read(self, path: Path) -> int:
        """See FileSystem."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open_write(self, path: Path) -> int:
        """See FileSystem."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def close(self, fd: int) -> None:
        """See FileSystem."""
        os.close(fd)

    def try_lock(self, fd: int) -> bool:
        """See FileSystem."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock(self, fd: int) -> None:
        """See FileSystem."""
        fcntl.flock(fd, fcntl.LOCK_EX)

    def allocate(self, fd: int, size: int) -> None:
        """See FileSystem."""
        if size and hasattr(os, "posix_fallocate"):  # macOS has none; there a full disk shows while writing
            os.posix_fallocate(fd, 0, size)
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
        """See FileSystem."""
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def pwrite_direct(self, fd: int, data: memoryview, offset: int) -> bool:
        """See FileSystem. Reads through the page cache see the bytes: Linux drops what it had of them."""
        if sys.platform != "linux":
            return False
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            try:
                return os.pwrite(fd, data, offset) == len(data)
            finally:
                fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        except OSError as error:
            if error.errno in _NOT_DIRECT:
                return False
            raise

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """See FileSystem."""
        data = os.pread(fd, length, offset)
        while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
            data += more  # Linux stops at 2 GiB per call, a signal may stop it earlier
        return data

    def readinto(self, fd: int, buffer: memoryview) -> int:
        """See FileSystem."""
        filled = 0
        while filled < len(buffer) and (count := os.preadv(fd, [buffer[filled:]], filled)):
            filled += count
        return filled

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """See FileSystem."""
        if sys.platform == "linux":  # begins to write dirty pages back; drops only those that are on the disk already
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def fdatasync(self, fd: int) -> None:
        """See FileSystem."""
        getattr(os, "fdatasync", os.fsync)(fd)

    def fsync_dir(self, path: Path) -> None:
        """See FileSystem."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """See FileSystem."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """See FileSystem."""
        path.unlink(missing_ok=True)

    def modified(self, path: Path) -> float | None:
        """See FileSystem."""
        try:
            return os.stat(path).st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def touch(self, path: Path, seconds: float) -> None:
        """See FileSystem."""
        os.utime(path, (seconds, seconds))


LOCAL = LocalFileSystem()


def storage_error(doing: str, path: Path, error: OSError) -> StorageError:
    """What an OSError is in our terms; `doing` completes "cannot ...", e.g. "write"."""
    if error.errno in _FULL:
        return DiskFull(f"cannot {doing} {path}: {error.strerror}; free some space or move the store")
    return StorageError(f"cannot {doing} {path}: {error.strerror}")


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into DiskFull or StorageError."""
    try:
        yield
    except OSError as error:
        raise storage_error(doing, path, error) from error
