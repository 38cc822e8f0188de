"""A file system in memory that fails on request, and that a power cut can hit between and within any two calls.

The model is the weakest that POSIX allows. Bytes and sizes are durable after fdatasync of the file; names are durable
after fsync of the directory that lost or gained them. Of everything else a power cut keeps any subset, and of a write
any set of sectors. rename is atomic. As on Linux, an fdatasync that fails forgets what it failed to write: the bytes
can still be read, but no later fdatasync makes them durable.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

SECTOR = 1 << 16  # coarse, so that the model stays fast; a real one is 512 bytes


class PowerCut(BaseException):
    """The machine is gone: not an Exception, because no handler may survive it."""


class Killed(BaseException):
    """All processes are gone, in the middle of a call of one of them; the machine runs on."""


@dataclass(eq=False)
class _File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[Callable[[bytearray, Random | None], None]] = field(default_factory=list)
    locked_by: int | None = None
    modified: float = 0.0


@dataclass(eq=False)
class _Name:
    """A change of directory entries that is not durable yet: `source` goes away, `target` comes to stand for `node`."""

    node: _File | None  # None: a directory
    source: Path | None
    target: Path | None

    def apply(self, names: dict[Path, _File | None]) -> None:
        if self.source is not None:
            names.pop(self.source, None)
        if self.target is not None:
            names[self.target] = self.node

    def touches(self, directory: Path) -> bool:
        return any(path is not None and path.parent == directory for path in (self.source, self.target))


class FaultyFileSystem:
    """Implements moehive.swarm.store.filesystem.FileSystem. `steps` counts the calls that can fail or be cut."""

    def __init__(self, *existing: Path, capacity: int = 1 << 40, seed: int = 0) -> None:
        self.steps = 0
        self.log: list[str] = []
        self.capacity = capacity  # bytes of all files together
        self.direct = True  # whether writes past the page cache work
        self._random = Random(seed)
        self._names: dict[Path, _File | None] = dict.fromkeys(existing)
        self._durable_names = dict(self._names)
        self._pending: list[_Name] = []
        self._open: dict[int, _File] = {}
        self._fds: Iterator[int] = itertools.count(3)
        self._cut_at: int | None = None
        self._kill_at: int | None = None
        self._faults: dict[int, int] = {}
        self._named_fault: tuple[str, str, int] | None = None
        self._dead: type[BaseException] | None = None
        self.now = 0.0  # what the machine's clock says; files get it when they are written to

    # --- what tests ask for ---------------------------------------------------------------------------------------

    def cut_power_at(self, step: int | None) -> None:
        """Let the machine die at this value of `steps`; a write is then torn."""
        self._cut_at = step

    def kill_at(self, step: int | None) -> None:
        """Let the processes die at this value of `steps`; of a write the beginning is done. Go on with `after_kill`."""
        self._kill_at = step

    def fail_at(self, step: int, code: int) -> None:
        """Let the call at this value of `steps` raise OSError(code)."""
        self._faults[step] = code

    def fail_next(self, call: str, detail: str, code: int) -> None:
        """Let the next `call` whose argument ends with `detail` raise OSError(code)."""
        self._named_fault = (call, detail, code)

    def heal(self) -> None:
        """Forget faults that have not happened."""
        self._faults.clear()
        self._cut_at = self._kill_at = None

    def after_power_cut(self, *, undoing_removals: bool = False) -> FaultyFileSystem:
        """The machine's disk after the cut, or after a cut right now. Or the fullest disk that it can leave behind:

        `undoing_removals`: no removal has reached the disk that did not have to, and everything else has.
        """
        rebooted = FaultyFileSystem(capacity=self.capacity, seed=self._random.getrandbits(32))
        rebooted.now, rebooted.direct = self.now, self.direct
        names = dict(self._durable_names)
        for change in self._pending:
            if change.target is not None if undoing_removals else self._random.random() < 0.5:
                change.apply(names)
        survivors: dict[int, _File] = {}
        for path, node in names.items():
            if self._lost_parent(path, names):
                continue
            if node is not None and id(node) not in survivors:
                survivors[id(node)] = self._survivor(node, whole=undoing_removals)
            rebooted._names[path] = None if node is None else survivors[id(node)]
        rebooted._durable_names = dict(rebooted._names)
        return rebooted

    def after_kill(self) -> FaultyFileSystem:
        """The same machine after the process was killed: locks and descriptors are gone, nothing else is."""
        for node in self._open.values():
            node.locked_by = None
        self._open.clear()
        self._dead = None
        self.heal()
        return self

    def files(self, below: Path) -> dict[Path, bytes]:
        """Every file below a directory, as a reader sees it now."""
        return {
            path: bytes(node.data)
            for path, node in self._names.items()
            if node is not None and path.is_relative_to(below)
        }

    def corrupt(self, path: Path, offset: int) -> None:
        """Flip one bit, on the disk and in the cache."""
        node = self._names[path]
        assert node is not None
        node.data[offset] ^= 1
        if offset < len(node.durable):
            node.durable[offset] ^= 1

    def lose(self, below: Path) -> None:
        """Delete every file below a directory, as a user might: at once, durably, and whoever has it open keeps it."""
        for names in (self._names, self._durable_names):
            for path in [path for path, node in names.items() if node is not None and path.is_relative_to(below)]:
                del names[path]
        self._pending = [
            change
            for change in self._pending
            if not any(path is not None and path.is_relative_to(below) for path in (change.source, change.target))
        ]

    # --- FileSystem -----------------------------------------------------------------------------------------------

    def mkdir(self, path: Path) -> bool:
        self._step("mkdir", path)
        if path in self._names:
            return False
        self._need_parent(path)
        self._change(_Name(None, None, path))
        return True

    def listdir(self, path: Path) -> list[str]:
        self._step("listdir", path)
        if path not in self._names:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return [name.name for name in self._names if name.parent == path and name != path]

    def size(self, path: Path) -> int | None:
        self._need_life()
        node = self._names.get(path)
        return None if node is None else len(node.data)

    def open_read(self, path: Path) -> int:
        self._step("open_read", path)
        return self._descriptor(path)

    def open_write(self, path: Path) -> int:
        self._step("open_write", path)
        if path not in self._names:
            self._need_parent(path)
            self._change(_Name(_File(), None, path))
        return self._descriptor(path)

    def close(self, fd: int) -> None:
        node = self._open.pop(fd, None)
        if node is not None and node.locked_by == fd:
            node.locked_by = None

    def try_lock(self, fd: int) -> bool:
        node = self._open[fd]
        if node.locked_by not in (None, fd):
            return False
        node.locked_by = fd
        return True

    def lock(self, fd: int) -> None:
        assert self.try_lock(fd), "this thread would wait for itself"

    def allocate(self, fd: int, size: int) -> None:
        node = self._file(fd)
        self._step("allocate", size)
        self._need_space(size - len(node.data))

        def resize(data: bytearray, random: Random | None = None) -> None:
            del data[size:]
            data.extend(bytes(size - len(data)))

        resize(node.data)
        node.pending.append(resize)
        node.modified = self.now

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._write("pwrite", fd, data, offset)

    def pwrite_direct(self, fd: int, data: memoryview, offset: int) -> bool:
        """As lost without a sync as any other. One that is refused has written some of it, as a short one has."""
        self._write("pwrite_direct", fd, data if self.direct else data[: len(data) // 2], offset)
        return self.direct

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        node = self._file(fd)
        self._step("pread", offset)
        return bytes(node.data[offset : offset + length])

    def readinto(self, fd: int, buffer: memoryview) -> int:
        data = self.pread(fd, len(buffer), 0)
        buffer[: len(data)] = data
        return len(data)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """What was not synced may be on the disk or not anyway."""

    def fdatasync(self, fd: int) -> None:
        node = self._file(fd)
        try:
            self._step("fdatasync", fd)
        except OSError:
            self._keep_some(node)
            raise
        for change in node.pending:  # and not what an earlier, failed call forgot
            change(node.durable, None)
        node.pending = []

    def fsync_dir(self, path: Path) -> None:
        self._step("fsync_dir", path)
        synced: list[_Name] = []
        names: set[Path | None] = set()
        for change in reversed(self._pending):  # with all that came before it under the same names
            if change.touches(path) or not names.isdisjoint({change.source, change.target} - {None}):
                synced.append(change)
                names |= {change.source, change.target} - {None}
        for change in reversed(synced):
            change.apply(self._durable_names)
        self._pending = [change for change in self._pending if change not in synced]

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        node = self._names.get(source)
        if node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._need_parent(target)
        self._change(_Name(node, source, target))

    def unlink(self, path: Path) -> None:
        self._step("unlink", path)
        if path in self._names:
            self._change(_Name(None, path, None))

    def modified(self, path: Path) -> float | None:
        self._need_life()
        node = self._names.get(path)
        return None if node is None else node.modified

    def touch(self, path: Path, seconds: float) -> None:
        self._step("touch", path)
        node = self._names.get(path)
        if node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        node.modified = seconds

    # --- parts ----------------------------------------------------------------------------------------------------

    def _step(self, call: str, detail: object) -> None:
        if self._dead is None and self.steps in (self._cut_at, self._kill_at):
            self._dead = PowerCut if self.steps == self._cut_at else Killed
        self._need_life()
        self.log.append(f"{call} {detail}")
        self.steps += 1
        code = self._faults.pop(self.steps - 1, None)
        if self._named_fault and call == self._named_fault[0] and str(detail).endswith(self._named_fault[1]):
            code, self._named_fault = self._named_fault[2], None
        if code is not None:
            raise OSError(code, os.strerror(code))

    def _need_life(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _write(self, call: str, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        node, copy = self._file(fd), bytes(data)

        def write(target: bytearray, random: Random | None) -> None:
            target.extend(bytes(max(0, offset - len(target))))
            for start in range(0, len(copy), SECTOR):
                if random is None or random.random() < 0.7:
                    piece = copy[start : start + SECTOR]
                    target[offset + start : offset + start + len(piece)] = piece

        if self.steps == self._cut_at:  # the write that the power cut tears
            node.pending.append(write)
        if self.steps == self._kill_at:
            copy = copy[: self._random.randrange(len(copy) + 1)]
            write(node.data, None)
            node.pending.append(write)
        self._step(call, offset)
        self._need_space(offset + len(copy) - len(node.data))
        write(node.data, None)
        node.pending.append(write)
        node.modified = self.now

    def _file(self, fd: int) -> _File:
        self._need_life()
        if fd not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open[fd]

    def _descriptor(self, path: Path) -> int:
        node = self._names.get(path)
        if node is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        fd = next(self._fds)
        self._open[fd] = node
        return fd

    def _change(self, change: _Name) -> None:
        change.apply(self._names)
        self._pending.append(change)

    def _need_parent(self, path: Path) -> None:
        if path.parent not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _need_space(self, more: int) -> None:
        used = sum(len(node.data) for node in self._names.values() if node is not None)
        if more > 0 and used + more > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _lost_parent(self, path: Path, names: dict[Path, _File | None]) -> bool:
        """A directory that the cut lost takes along what is below it."""
        known = {*self._names, *self._durable_names}
        return any(parent in known and parent not in names for parent in path.parents)

    def _survivor(self, node: _File, *, whole: bool) -> _File:
        if whole:
            return _File(bytearray(node.data), bytearray(node.data), modified=node.modified)
        self._keep_some(node)
        when = node.modified if self._random.random() < 0.5 else 0.0
        return _File(bytearray(node.durable), bytearray(node.durable), modified=when)

    def _keep_some(self, node: _File) -> None:
        """Of what was not synced, let any subset reach the disk, and forget the rest."""
        for change in node.pending:
            if self._random.random() < 0.5:
                change(node.durable, self._random)
        node.pending = []
