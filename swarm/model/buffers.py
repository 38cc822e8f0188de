"""Host memory that is used again: buffers for shards, taken back when nobody can see them any more.

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
    """Buffers of shards. `allocate` stands for `empty_bytes`; thread-safe.

    Bytes that are free but kept never add to those in use beyond the most that were in use at once: memory is asked for
    only when no free buffer fits, and then all free buffers of other sizes are given to the system first. `drop` gives
    them up at any time.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.RLock()  # a buffer may come back, by garbage collection, inside any of our own lines
        self._generation = 0
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

    def drop(self) -> None:
        """Give all free buffers to the system; what is in use now does not come back here either."""
        with self._lock:
            self._generation += 1
            self._free = []

    def _take(self, size: int) -> NDArray[Any]:
        with self._lock:
            for index, memory in enumerate(self._free):
                if memory.nbytes == size:
                    del self._free[index]
                    self.reused += 1
                    return memory
            self._free = []
            self.fresh += 1
        return np.empty(size, dtype=np.uint8)

    def _give_back(self, memory: NDArray[np.uint8], generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._free.append(memory)
