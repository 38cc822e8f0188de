"""Threads that move bytes, behind everything that somebody waits for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

# Linux's nice value of these threads. Beside bulk at full speed on two busy cores, the 99th percentile of an 8 KiB
# round trip of activations was 13 times that at idle with 0, 3 times with 10, 1.1 times with 15. Of a core that others
# keep busy, 15 leaves 3 %: some 50 MB/s.
NICENESS = 15


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
