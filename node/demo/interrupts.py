"""Being told to stop, without leaving anything running: signals as exceptions, once, and not at every moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Let the first Ctrl-C, SIGTERM or SIGHUP end what is being done, and no later one what is being cleaned up.

    A context manager; an error that leaves it after a signal is what the signal led to, and becomes that end. While
    `held()` lasts the end is put off: between the start of a process and the moment when somebody is responsible for
    stopping it.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._arrived: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Imports of large libraries swallow what is raised in them, and fail later for want of what was not imported.
        if self._arrived is not None and isinstance(error, Exception):
            _end(self._arrived)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put the end off until this context is left."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._arrived is not None:
            _end(self._arrived)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        self._arrived = number
        if not self._held:
            _end(number)


def _end(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
