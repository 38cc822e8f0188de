"""A command under a hard limit of memory: a control group of its own below the one that we are in.

Version 2 where the memory controller is there, else version 1; both need the right to make groups (root, or a
delegated subtree). Where neither can be had, RLIMIT_DATA stands in: it bounds what the process allocates, and not the
page cache, so nothing is killed for reading files. `Limited.kind` says which it was.
"""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_ENTER = 'echo $$ > "$0" && exec "$@"'  # a shell joins the group and becomes the command
_SAMPLE = 0.02  # seconds between looks at what is in use


@dataclass(slots=True)
class Usage:
    """Bytes, at their highest."""

    charged: int = 0  # all that counts against the limit, page cache included: the kernel lets that fill what is free
    anonymous: int = 0  # without page cache: what could not be given back
    pressed: int = 0  # how often the limit was reached and page cache had to be given back


@dataclass(slots=True)
class Outcome:
    """How a command ended."""

    code: int  # negative: the signal that killed it
    out: str
    err: str
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class Limited:
    """Where commands are run."""

    kind: str
    group: Path | None
    limit: int

    def run(self, command: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None) -> Outcome:
        """Run it to its end; both outputs as text. Raises subprocess.TimeoutExpired."""
        usage, stop = Usage(), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(usage, stop))
        entering = [] if self.group is None else ["/bin/sh", "-c", _ENTER, str(self.group / "cgroup.procs")]
        before = None if self.group is not None else self._limit_data
        watcher.start()
        try:
            done = subprocess.run(
                [*entering, *command], capture_output=True, text=True, timeout=timeout, env=environment,
                check=False, preexec_fn=before,
            )  # fmt: skip
        finally:
            stop.set()
            watcher.join()
        return Outcome(done.returncode, done.stdout, done.stderr, usage)

    def _limit_data(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (self.limit, self.limit))

    def _watch(self, usage: Usage, stop: threading.Event) -> None:
        if self.group is None:
            return
        version_2 = (self.group / "memory.max").exists()
        peak, anonymous = ("memory.peak", "anon") if version_2 else ("memory.max_usage_in_bytes", "total_rss")
        while not stop.wait(_SAMPLE):
            usage.anonymous = max(usage.anonymous, _field(self.group / "memory.stat", anonymous))
        usage.charged = _number(self.group / peak)
        pressed = self.group / ("memory.events" if version_2 else "memory.failcnt")
        usage.pressed = _field(pressed, "max") if version_2 else _number(pressed)


@contextmanager
def limited(limit: int) -> Iterator[Limited]:
    """A group with `limit` bytes, removed afterwards; or the substitute."""
    for kind, make in (("control group, version 2", _version_2), ("control group, version 1", _version_1)):
        group = make(limit)
        if group is not None:
            try:
                yield Limited(kind, group, limit)
            finally:
                _remove(group)
            return
    yield Limited("RLIMIT_DATA: page cache is not bounded", None, limit)


def _version_2(limit: int) -> Path | None:
    own = _own("0::")
    parent = _ROOT / own
    if "memory" not in _text(parent / "cgroup.subtree_control").split():
        return None
    return _make(parent, {"memory.max": limit, "memory.swap.max": 0})


def _version_1(limit: int) -> Path | None:
    parent = _ROOT / "memory" / _own(":memory:")
    return _make(parent, {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit})


def _make(parent: Path, settings: Mapping[str, int]) -> Path | None:
    group = parent / f"moehive-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    (first, limit), *others = settings.items()
    try:
        (group / first).write_text(str(limit))
    except OSError:
        _remove(group)
        return None
    for name, value in others:
        with suppress(OSError):  # no accounting of swap
            (group / name).write_text(str(value))
    return group


def _remove(group: Path) -> None:
    for _ in range(100):  # its last process may be on its way out
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def _own(line_part: str) -> str:
    """The path of our own group, without the leading slash."""
    lines = (line for line in _text(Path("/proc/self/cgroup")).splitlines() if line_part in line)
    return next((line.rsplit(":", 1)[1].lstrip("/") for line in lines), "")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0


def _field(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
