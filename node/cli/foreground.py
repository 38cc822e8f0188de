"""Something that runs in the foreground until Ctrl-C: a signal asks it to stop, a second one ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable

from .errors import INTERRUPTED

_GRACE_AFTER_SECOND_SIGNAL = 2.0  # seconds for what cannot be interrupted, such as a computation in a thread
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def until_signal(run: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `run(stop)`, where the first signal sets `stop`, and the second cancels it; the exit code."""
    stop = asyncio.Event()
    running = asyncio.ensure_future(run(stop))
    codes: list[int] = []

    def on_signal(number: signal.Signals) -> None:
        if not stop.is_set():
            stop.set()
            return
        codes.append(128 + number)
        running.cancel()
        _exit_soon(codes[0])

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        await running
    except asyncio.CancelledError:
        return codes[0] if codes else INTERRUPTED
    return 0


def _exit_soon(code: int) -> None:
    """End the process even if something in it does not stop."""
    timer = threading.Timer(_GRACE_AFTER_SECOND_SIGNAL, os._exit, (code,))
    timer.daemon = True
    timer.start()
