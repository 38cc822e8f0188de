"""What live processes use of a store, so that nobody deletes it under their hands.

A process that uses objects keeps a file locked that lists their hashes; the lock goes when the process does, however it
ends and whatever the clocks say. A file without a lock means nothing, and whoever finds one removes it. A list that
cannot be read whole means everything: that errs towards keeping, and lets a process start on a full disk.

Create and read inside the ledger's lock: between a file's creation and its lock it would look abandoned.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moehive.protocol.errors import DiskFull
from moehive.protocol.ids import ShardHash

from .filesystem import FileSystem, storage_errors
from .layout import StoreLayout

_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class InUse:
    """What live processes use: `in` answers for one object."""

    objects: frozenset[ShardHash] = frozenset()
    everything: bool = False  # somebody's list could not be written or read

    def __contains__(self, object_hash: object) -> bool:
        return self.everything or object_hash in self.objects


class Uses:
    """The use files of one store."""

    def __init__(self, layout: StoreLayout, fs: FileSystem) -> None:
        self._layout = layout
        self._fs = fs

    def begin(self, objects: Iterable[ShardHash]) -> tuple[int, Path]:
        """Say that this process uses `objects`; the descriptor that holds the lock, and the file.

        Raises StorageError. On a full disk the file stays empty, which protects the whole store.
        """
        fs, path = self._fs, self._layout.uses / secrets.token_hex(8)
        data = b"".join(map(bytes.fromhex, objects))
        with storage_errors("create", path):
            fd = fs.open_write(path)
        try:
            with storage_errors("lock", path):
                locked = fs.try_lock(fd)
            assert locked, "nobody else knows the name"
            self._write(fd, data, path)
        except BaseException:
            fs.close(fd)
            raise
        return fd, path

    def end(self, fd: int, path: Path) -> None:
        """The opposite of `begin`, outside the lock. Raises StorageError; the file means nothing all the same."""
        self._fs.close(fd)
        with storage_errors("delete", path):
            self._fs.unlink(path)

    def scan(self) -> InUse:
        """What live processes use. Raises StorageError."""
        objects: set[ShardHash] = set()
        everything = False
        with storage_errors("read", self._layout.uses):
            for name in self._fs.listdir(self._layout.uses):
                data = self._read(self._layout.uses / name)
                if data is not None:
                    everything |= not data or len(data) % _HASH_BYTES != 0
                    objects.update(ShardHash(data[i : i + _HASH_BYTES].hex()) for i in range(0, len(data), _HASH_BYTES))
        return InUse(frozenset(objects), everything)

    def _write(self, fd: int, data: bytes, path: Path) -> None:
        try:
            with storage_errors("write", path):
                self._fs.allocate(fd, len(data))
                self._fs.pwrite(fd, data, 0)
        except DiskFull:
            with storage_errors("write", path):
                self._fs.allocate(fd, 0)

    def _read(self, path: Path) -> bytes | None:
        """The list of a live process; None for what is not one, which is removed."""
        fs = self._fs
        try:
            fd = fs.open_read(path)
        except FileNotFoundError:  # it has just ended
            return None
        try:
            if fs.try_lock(fd):
                fs.unlink(path)
                return None
            return fs.pread(fd, fs.size(path) or 0, 0)
        finally:
            fs.close(fd)
