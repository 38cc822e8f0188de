"""How a long operation tells its caller where it is. The command line draws a bar from it."""

from __future__ import annotations

import threading
from typing import Protocol


class Progress(Protocol):
    """Called after every block, one call at a time, from worker threads. It must return quickly."""

    def __call__(self, done: int, total: int, file: str) -> None:
        """`done` of `total` bytes are finished; the last of them belong to `file`."""


def silent(done: int, total: int, file: str) -> None:
    """Tell nobody."""


class Counter:
    """Adds up the bytes of several threads and passes the sum on."""

    def __init__(self, total: int, report: Progress) -> None:
        self._total = total
        self._report = report
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count: int, file: str) -> None:
        """`count` more bytes, of `file`, are finished."""
        with self._lock:
            self._done += count
            self._report(self._done, self._total, file)
