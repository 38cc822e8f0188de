"""Threads that move bytes, behind everything that somebody waits for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

# Linux's nice value of a thread. At 19 a thread gets 1.5 % of a processor that others keep busy, at 10 it gets 10 %,
# and activations still overtake it at once.
NICENESS = 10


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread that runs `work` and gives way."""

    def run() -> None:
        give_way()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def give_way() -> None:
    """Lower the priority of this thread, for good."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own that this call could set
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
