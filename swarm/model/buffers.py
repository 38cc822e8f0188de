"""Host memory that is used again: buffers for shards and weights, taken back when nobody can see them any more.

Memory fresh from the system costs a page fault and a cleared page for every 4 KiB, which for an expert is a large part
of reading it from the page cache. A buffer comes back when the last tensor on it is gone, however many views were made
and whoever kept one: nothing has to be given back, and nothing that somebody still sees is written over.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tensors import ALIGNMENT, empty_bytes

SMALLEST: Final = 1 << 16  # bytes; below it the allocator is as quick

Allocate = Callable[[int, int], Tensor]  # (size, aligned offset) -> uint8 [size]; see tensors.empty_bytes


class HostBuffers:
    """Buffers of any size. Thread-safe.

    Those that are free and those in use together never take more bytes than were in use at once since the last `drop`,
    so that who keeps what is in use within a budget keeps all of it there. Where fresh memory would take more, free
    buffers of other sizes go back to the system first, the oldest before others. One pool for all that shares a budget:
    two would each keep their own most.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []  # oldest first
        self._lock = threading.RLock()  # a buffer may come back, by garbage collection, inside any of our own lines
        self._generation = 0
        self._used = self._most = 0  # bytes now, and at once since the last drop
        self._keeps = True
        self.fresh = self.reused = 0  # buffers

    def allocate(self, size: int, aligned_offset: int = 0) -> Tensor:
        """An uninitialised writable uint8 tensor [size], its byte at `aligned_offset` on a 64-byte boundary."""
        if size < SMALLEST:
            return empty_bytes(size, aligned_offset)
        memory = self._take(size + ALIGNMENT)
        loan = memory.view()  # the tensor's storage keeps this object alive, and nothing else does
        tensor = torch.from_numpy(loan)
        weakref.finalize(loan, self._give_back, memory, self._generation).atexit = False
        start = -(tensor.data_ptr() + aligned_offset) % ALIGNMENT
        return tensor[start : start + size]

    @property
    def free_bytes(self) -> int:
        """Bytes of buffers that nobody uses."""
        with self._lock:
            return sum(memory.nbytes for memory in self._free)

    @property
    def taken_bytes(self) -> int:
        """Bytes of all buffers, in use or free."""
        with self._lock:
            return self._used + self.free_bytes

    def drop(self) -> None:
        """Give all free buffers to the system; what is in use now does not come back here either."""
        with self._lock:
            self._generation += 1
            self._free = []
            self._most = self._used

    def keep(self, keeps: bool) -> None:
        """Whether free buffers are kept from now on: not where other memory takes their place in the budget."""
        with self._lock:
            self._keeps = keeps
            self.drop()

    def _take(self, size: int) -> NDArray[Any]:
        with self._lock:
            self._used += size
            self._most = max(self._most, self._used)
            for index, memory in enumerate(self._free):
                if memory.nbytes == size:
                    del self._free[index]
                    self.reused += 1
                    return memory
            while self._free and self._used + self.free_bytes > self._most:
                del self._free[0]
            self.fresh += 1
        try:
            return np.empty(size, dtype=np.uint8)
        except MemoryError:
            with self._lock:
                self._used -= size
            raise

    def _give_back(self, memory: NDArray[np.uint8], generation: int) -> None:
        with self._lock:
            self._used -= memory.nbytes
            if self._keeps and generation == self._generation:
                self._free.append(memory)
