"""How many bytes of the store's budget are taken, kept right across threads, processes and crashes.

The files are the truth. What is kept in memory is a copy of their sizes, read when a process first needs it and again
after another process changed something: every change happens under one lock file and advances the counter in it.
Nothing here needs to survive a crash.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moehive.protocol.ids import ShardHash
from moehive.protocol.units import format_size

from .base import DiskBudgetFull
from .filesystem import FileSystem, storage_errors
from .layout import StoreLayout

_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_COUNTER_BYTES = 8
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store holds, in bytes except for `objects`."""

    objects: int
    object_bytes: int
    partial_bytes: int  # reserved by downloads, finished or abandoned
    budget_bytes: int

    @property
    def used_bytes(self) -> int:
        """All that counts against the budget."""
        return self.object_bytes + self.partial_bytes


class Ledger:
    """Sizes of finished and partial objects. Read and change them only inside `locked`."""

    def __init__(self, layout: StoreLayout, budget_bytes: int, fs: FileSystem) -> None:
        self.objects: dict[ShardHash, int] = {}
        self.partials: dict[ShardHash, int] = {}
        self.budget_bytes = budget_bytes
        self._layout = layout
        self._fs = fs
        self._mutex = threading.Lock()
        self._seen: int | None = None  # the counter at which the copies above were right
        self._durable: set[Path] = set()  # directories whose own entry this process has synced
        self._removed_from: set[Path] = set()  # directories out of which something went that is not synced yet

    @contextmanager
    def locked(self, *, change: bool) -> Iterator[None]:
        """Exclude every other thread and process; `change` tells them to read the files again afterwards.

        Raises StorageError, DiskFull. Hold it for moments only: never while hashing, syncing data or waiting.
        """
        fs, path = self._fs, self._layout.lock
        with self._mutex:
            with storage_errors("open", path):
                self._prepare()
                fd = fs.open_write(path)
            try:
                with storage_errors("lock", path):
                    fs.lock(fd)
                    self._refresh(fd, change)
                try:
                    yield
                    self._sync_removed()
                except BaseException:
                    self._seen = None  # half a change: ask the files
                    raise
            finally:
                fs.close(fd)

    def reserve(self, object_hash: ShardHash, size: int) -> None:
        """Count a partial file of `size` bytes. Raises DiskBudgetFull where that is too much."""
        used = self.usage().used_bytes
        needed = size - self.partials.get(object_hash, 0)
        if used + needed > self.budget_bytes:
            budget = self.budget_bytes
            what = f"the {format_size(size)} of object {object_hash}"
            raise DiskBudgetFull(self._layout.root, what, needed=needed, used=used, budget=budget)
        self.partials[object_hash] = size

    def remove(self, path: Path) -> None:
        """Remove a file. Durable when `locked` ends, so that nobody fills room which a power cut would fill again.

        Raises OSError.
        """
        self._fs.unlink(path)
        self._removed_from.add(path.parent)

    def usage(self) -> Usage:
        """The sums."""
        objects, partials = self.objects, self.partials
        return Usage(len(objects), sum(objects.values()), sum(partials.values()), self.budget_bytes)

    def make_fan_out(self, object_hash: ShardHash) -> None:
        """Create the directory of an object, durably. Raises OSError."""
        self._make_directory(self._layout.object(object_hash).parent)

    def _prepare(self) -> None:
        layout = self._layout
        for directory in (layout.root, layout.objects, layout.partials, layout.pins, layout.uses):
            self._make_directory(directory)

    def _sync_removed(self) -> None:
        for directory in sorted(self._removed_from):
            with storage_errors("sync", directory), suppress(FileNotFoundError):  # nothing was there at all
                self._fs.fsync_dir(directory)
            self._removed_from.discard(directory)

    def _make_directory(self, path: Path) -> None:
        """Create a directory and its parents, durably; once per process.

        The entries of those that exist are synced too: whoever made them may have been killed before doing so. Only
        directories of others, which we may neither write nor sync, are taken as they are.
        """
        if path in self._durable or path == path.parent:
            return
        self._make_directory(path.parent)
        created = self._fs.mkdir(path)
        try:
            self._fs.fsync_dir(path.parent)
        except OSError as error:
            if created or error.errno not in _NOT_OURS:
                raise
        self._durable.add(path)

    def _refresh(self, fd: int, change: bool) -> None:
        counter = int.from_bytes(self._fs.pread(fd, _COUNTER_BYTES, 0), "big")
        if counter != self._seen:
            self.objects, self.partials = self._scan_objects(), self._scan_partials()
        if change:  # before the change: if this write fails, nothing has happened yet
            counter += 1
            self._fs.pwrite(fd, counter.to_bytes(_COUNTER_BYTES, "big"), 0)
        self._seen = counter

    def _scan_objects(self) -> dict[ShardHash, int]:
        found: dict[ShardHash, int] = {}
        for fan_out in filter(_FAN_OUT.fullmatch, self._fs.listdir(self._layout.objects)):
            for name in self._fs.listdir(self._layout.objects / fan_out):
                object_hash = self._layout.object_of(name)
                if object_hash is not None and (size := self._fs.size(self._layout.object(object_hash))) is not None:
                    found[object_hash] = size
        return found

    def _scan_partials(self) -> dict[ShardHash, int]:
        found: dict[ShardHash, int] = {}
        for name in self._fs.listdir(self._layout.partials):
            object_hash = self._layout.partial_of(name)
            if object_hash is not None and (size := self._fs.size(self._layout.partial(object_hash))) is not None:
                found[object_hash] = size
        return found
