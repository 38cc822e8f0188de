"""How many bytes of the store's budget are taken, kept right across threads, processes and crashes.

The files are the truth. What is kept in memory is a copy of their sizes, read when a process first needs it and again
after another process changed something: every change happens under one lock file and advances the counter in it.
Nothing here needs to survive a power cut.

One thing has to survive a process: that something was removed and that this is not durable yet. Its room must not be
filled before, or a power cut that brings it back leaves more than the budget. So the lock file says it, and whoever
reserves room syncs first; a power cut settles it by itself.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moehive.protocol.ids import ShardHash
from moehive.protocol.units import format_size

from .base import DiskBudgetFull
from .filesystem import FileSystem, storage_errors
from .layout import StoreLayout

_FAN_OUT = re.compile(r"[0-9a-f]{2}")
_COUNTER_BYTES = 8  # of the lock file; one more byte behind them: whether a removal may not be durable
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
        # While it is locked:
        self._fd: int | None = None  # of the lock file
        self._unsettled = False  # somebody removed something before, and failed or was killed before that was durable
        self._removed_from: set[Path] = set()  # directories out of which this process has removed something

    @contextmanager
    def locked(self, *, change: bool) -> Iterator[None]:
        """Exclude every other thread and process; `change` tells them to read the files again afterwards.

        Raises StorageError, DiskFull. Hold it for moments only: never while hashing, syncing data or waiting.
        """
        fs, path = self._fs, self._layout.lock
        with self._mutex:
            with storage_errors("open", path):
                self._prepare()
                self._fd = fd = fs.open_write(path)
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
                self._fd = None
                self._removed_from.clear()
                fs.close(fd)

    def reserve(self, object_hash: ShardHash, size: int) -> None:
        """Count a partial file of `size` bytes. Raises DiskBudgetFull where that is too much, StorageError."""
        used = self.usage().used_bytes
        needed = size - self.partials.get(object_hash, 0)
        if used + needed > self.budget_bytes:
            budget = self.budget_bytes
            what = f"the {format_size(size)} of object {object_hash}"
            raise DiskBudgetFull(self._layout.root, what, needed=needed, used=used, budget=budget)
        if needed > 0 and (self._unsettled or self._removed_from):
            self._settle()
        self.partials[object_hash] = size

    def remove(self, path: Path) -> None:
        """Remove a file. Durable when `locked` ends well, and always before its room is reserved.

        Raises OSError, StorageError.
        """
        if not self._unsettled and not self._removed_from:
            self._say_unsettled(True)  # first: whatever happens to this process then, the next one knows
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
        """Make durable what this process has removed. What others left unsettled stays so: it costs more."""
        self._sync(self._removed_from)
        if self._removed_from and not self._unsettled:
            self._say_unsettled(False)

    def _settle(self) -> None:
        """Make every removal durable, whoever it was by."""
        with storage_errors("read", self._layout.objects):
            fan_outs = [name for name in self._fs.listdir(self._layout.objects) if _FAN_OUT.fullmatch(name)]
        self._sync({self._layout.partials, *(self._layout.objects / name for name in fan_outs)})
        self._say_unsettled(False)
        self._unsettled = False
        self._removed_from.clear()

    def _sync(self, directories: Collection[Path]) -> None:
        for directory in sorted(directories):
            with storage_errors("sync", directory), suppress(FileNotFoundError):  # nothing was there at all
                self._fs.fsync_dir(directory)

    def _say_unsettled(self, unsettled: bool) -> None:
        assert self._fd is not None, "outside `locked`"
        with storage_errors("write", self._layout.lock):
            self._fs.pwrite(self._fd, bytes([unsettled]), _COUNTER_BYTES)

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
        found = self._fs.pread(fd, _COUNTER_BYTES + 1, 0)
        counter, self._unsettled = int.from_bytes(found[:_COUNTER_BYTES], "big"), any(found[_COUNTER_BYTES:])
        if counter != self._seen:
            self.objects, self.partials = self._scan_objects(), self._scan_partials()
        if change:  # before the change: if this write fails, nothing has happened yet
            counter += 1
            self._fs.pwrite(fd, counter.to_bytes(_COUNTER_BYTES, "big") + bytes([self._unsettled]), 0)
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
