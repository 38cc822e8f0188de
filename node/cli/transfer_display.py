"""How a long transfer shows on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moehive.protocol.units import format_size

from .output import note

if TYPE_CHECKING:
    from rich.progress import Progress

    from moehive.protocol.manifest import Manifest
    from moehive.swarm.transfer.progress import TransferProgress

LINE_EVERY = 10.0  # seconds, where stderr is not a terminal


class TransferDisplay:
    """A Watcher (swarm/whole_model.py) as a context manager. Calls may come from any thread."""

    def __init__(
        self,
        *,
        write: Callable[[str], None] = note,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._clock = clock
        self._lock = threading.Lock()
        self._total = 0
        self._found = 0
        self._said = clock()
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("looking for the model", total=None, state="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, manifest: Manifest, total: int) -> None:
        """See Watcher."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, description=manifest.model.name, total=total)

    def found(self, size: int) -> None:
        """See Watcher."""
        with self._lock:
            self._found += size
            self._show(self._found, "here already")

    def transfer(self, progress: TransferProgress) -> None:
        """See Watcher."""
        with self._lock:
            self._show(self._found + progress.verified, describe(progress))

    def _show(self, done: int, state: str) -> None:
        text = f"{format_size(done)} of {format_size(self._total)}{', ' if state else ''}{state}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=text)
        elif self._clock() - self._said >= LINE_EVERY:
            self._said = self._clock()
            percent = 100 * done // self._total if self._total else 100
            self._write(f"{text} ({percent} %)")


def describe(progress: TransferProgress) -> str:
    """How fast, from whom, how much longer: "80.1 MiB/s from 3 peers, 2 min left"."""
    seeds = sum(peer.startswith("seed ") for peer in progress.peers)
    sources = [
        f"{count} {name}{'s' * (count > 1)}"
        for count, name in ((len(progress.peers) - seeds, "peer"), (seeds, "seed"))
        if count
    ]
    parts = [f"{format_size(round(progress.rate))}/s" + (f" from {' and '.join(sources)}" if sources else "")]
    if progress.eta is not None:
        parts.append(f"{duration(progress.eta)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time for people: "45 s", "2 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
