"""Buffers of bytes that count against a budget."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_OWN_PAGES: Final = 16 * mmap.PAGESIZE


@dataclass(slots=True)
class Account:
    """Bytes of one tier."""

    limit: int
    used: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Count bytes that are about to be used. What exceeds the limit is a bug of ours: plans come first."""
        assert self.used + nbytes <= self.limit, f"{self.used} + {nbytes} bytes in a budget of {self.limit}"
        self.used += nbytes
        self.peak = max(self.peak, self.used)

    def give(self, nbytes: int) -> None:
        """Count bytes that are free again."""
        self.used -= nbytes


class BufferPool:
    """Flat buffers [nbytes] uint8 on one device, counted in `account`; the last one given back is used again."""

    def __init__(self, account: Account, device: torch.device, *, pinned: bool = False) -> None:
        self.account = account
        self.device = device
        self._pinned = pinned
        self._spare: Tensor | None = None

    def take(self, nbytes: int) -> Tensor:
        """A buffer with any content."""
        spare = self._spare
        if spare is not None and spare.numel() == nbytes:
            self._spare = None
            return spare
        self.drop_spare()
        self.account.take(nbytes)
        return _allocate(nbytes, self.device, pinned=self._pinned)

    def give(self, buffer: Tensor) -> None:
        """Back. It stays counted while it is kept for the next one who asks."""
        self.drop_spare()
        self._spare = buffer

    def free(self, buffer: Tensor) -> None:
        """Back to the system, once nobody has a view of it."""
        self.account.give(buffer.numel())

    def drop_spare(self) -> None:
        """Free what is kept."""
        if self._spare is not None:
            self.free(self._spare)
            self._spare = None

    @property
    def room(self) -> int:
        """Bytes that can be taken."""
        return self.account.limit - self.account.used + (0 if self._spare is None else self._spare.numel())


def view_bytes(buffer: Tensor) -> memoryview:
    """The bytes of a buffer in host memory, shared."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers from Python 3.12 on


def _allocate(nbytes: int, device: torch.device, *, pinned: bool) -> Tensor:
    # Tensors made in inference mode could never be written to outside of it; a cache may see both.
    with torch.inference_mode(False):
        if device.type != "cpu" or pinned:
            return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        if nbytes < _OWN_PAGES:
            return torch.empty(nbytes, dtype=torch.uint8)
        # Pages of its own go back to the system when it is dropped; the heap would keep what a growing slot leaves.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.uint8)
