"""A file without a name: what is in it exists as long as this process holds it open, and no longer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from moehive.protocol.errors import StorageError
from moehive.swarm.store.filesystem import storage_errors

_VECTORS: Final = min(1024, os.sysconf("SC_IOV_MAX"))  # buffers that one call may fill


class ScratchFile:
    """Bytes on disk that nobody else can open and that a crash leaves nothing of. Close it, or let it be collected.

    The directory is made where it does not exist, for its owner only. Raises DiskFull, StorageError.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with storage_errors("make a KV cache file in", directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Without a name from the start where the system can do that (O_TMPFILE), else removed at once; mode 0600.
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                self._fd: int | None = os.dup(file.fileno())

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        assert self._fd is not None, "the file is closed"
        with storage_errors("write a KV cache file in", self._directory):
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def read_into(self, parts: Sequence[memoryview], offset: int) -> None:
        """Fill `parts`, one after the other, with what follows `offset`."""
        assert self._fd is not None, "the file is closed"
        with storage_errors("read a KV cache file in", self._directory):
            for first in range(0, len(parts), _VECTORS):
                offset += _fill(self._fd, list(parts[first : first + _VECTORS]), offset)

    def truncate(self, size: int) -> None:
        """Give back the space of all that follows the first `size` bytes."""
        assert self._fd is not None, "the file is closed"
        with storage_errors("cut a KV cache file in", self._directory):
            os.ftruncate(self._fd, size)

    def close(self) -> None:
        """Give back all of its space. Closing again does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # __init__ may have failed
            self.close()


def _fill(fd: int, parts: list[memoryview], offset: int) -> int:
    """Fill all of `parts` from `offset`; how many bytes that were."""
    wanted = sum(map(len, parts))
    done = os.preadv(fd, parts, offset)
    while done < wanted:  # at the end of the file, after a signal, or beyond 2 GiB
        rest = _after(parts, done)
        count = os.preadv(fd, rest, offset + done)
        if count == 0:
            raise StorageError("a KV cache file is shorter than what was written to it")
        done += count
    return done


def _after(parts: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `parts` after `done` bytes."""
    for index, part in enumerate(parts):
        if done < len(part):
            return [part[done:], *parts[index + 1 :]]
        done -= len(part)
    return []
