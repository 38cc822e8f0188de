"""Ctrl-C while a large library is imported, which takes seconds and does not stand what is raised in it.

Parts of transformers swallow it, and fail later for want of what was not imported; torch's C++ aborts with a dump.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from .errors import INTERRUPTED

R = TypeVar("R")


class ImportInterrupts:
    """Ctrl-C that comes into an import ends the process at once, where nothing else goes on that could be cleaned up.

    Otherwise an error that leaves this context afterwards is what that led to, and becomes KeyboardInterrupt. A context
    manager; it changes nothing where it is not on the main thread, or somebody else handles Ctrl-C.
    """

    def __init__(self) -> None:
        self._installed = False
        self._during_import = False

    def __enter__(self) -> Self:
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_interrupt)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._during_import and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            if threading.active_count() == 1:
                os._exit(INTERRUPTED)  # what we write to disk stands being killed: see convert and store
            self._during_import = True
        signal.default_int_handler(number, frame)


def run_async(main: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run`, which cancels `main` at the first Ctrl-C, but only where Python's own handler is installed."""
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(getattr(handler, "__self__", None), ImportInterrupts):
        return asyncio.run(main)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return asyncio.run(main)
    finally:
        signal.signal(signal.SIGINT, handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
