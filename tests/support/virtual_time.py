"""An event loop whose clock is its own: where everybody waits, it jumps to the next timer.

For runs of hours in seconds that need no sockets and no threads:

    run_virtually(main())           # asyncio.run, in virtual time; `loop.time()` is the clock
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(AssertionError):
    """Everybody waits, and no timer is set."""


class _Selector(selectors.DefaultSelector):
    """Never waits: tells the loop instead how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0  # seconds, all together

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock
        self.waited += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._virtual.waited


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
