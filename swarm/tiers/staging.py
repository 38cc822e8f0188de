"""Host memory that uploads to a device go through: a fixed number of buffers, so that a budget can have them in it."""

from __future__ import annotations

import threading
from threading import get_ident
from typing import Final

from torch import Tensor

from .accelerator import Accelerator, Event

_LOOK: Final = 1.0  # seconds after which who waits for a buffer looks for itself


class Staging:
    """One buffer. Changed under the lock of its `StagingBuffers`, but for `copied`, which is its user's."""

    __slots__ = ("copied", "memory", "thread")

    def __init__(self) -> None:
        self.memory: Tensor | None = None  # uint8 [bytes], from its first use on
        self.thread = 0  # that uses it; 0: it is free
        self.copied: Event | None = None  # the end of the last copy from it


class StagingBuffers:
    """At most `count` buffers of `nbytes` each, page-locked where the device has its own memory. Thread-safe."""

    def __init__(self, accelerator: Accelerator, nbytes: int, count: int) -> None:
        self._accelerator = accelerator
        self._nbytes = nbytes
        self._free = threading.Condition()
        self.buffers = [Staging() for _ in range(count)]

    @property
    def most_bytes(self) -> int:
        """What they take at most."""
        return self._nbytes * len(self.buffers)

    def take(self) -> tuple[Staging, Tensor]:
        """A buffer that no copy reads, and its memory; waits for one. Raises what Accelerator.staging raises."""
        with self._free:
            while (found := next((one for one in self.buffers if not one.thread), None)) is None:
                self._free.wait(_LOOK)  # who gave one back may have been interrupted before it said so
            found.thread = get_ident()
        if found.copied is not None:  # over, unless whoever waited for it was interrupted
            found.copied.synchronize()
        if found.memory is None:
            try:
                found.memory = self._accelerator.staging(self._nbytes)
            except BaseException:
                self.give(found)
                raise
        return found, found.memory

    def give(self, buffer: Staging) -> None:
        """It is free again."""
        with self._free:
            buffer.thread = 0
            self._free.notify()

    def recover(self, thread: int) -> None:
        """Free what a thread had that was interrupted."""
        with self._free:
            for buffer in self.buffers:
                if buffer.thread == thread:
                    buffer.thread = 0
            self._free.notify_all()
