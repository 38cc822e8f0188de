"""Buffers with a margin around them, so that a kernel that reads or writes beside its tensors is caught.

    with Canaries() as guard:
        x, out = guard(x), guard.empty((T, K), torch.float32)
        kernel[grid](x, out, ...)
    # leaving the block checks that no margin changed

Inside `with guard.allocations():` whatever calls torch.empty gets a guarded tensor: outputs that a launcher makes.

Floating margins are NaN, so a value that was read there spoils the result; integer margins are far outside any index.
A value that is read and not used shows only with `before_a_wall`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from unittest.mock import patch

import torch
from torch import Tensor

_MARGIN = 256  # bytes on each side; keeps 16-byte alignment, and every dtype's size divides it
_BYTE = 0xA5


class Canaries:
    """Makes guarded tensors; checks all margins at the end of the block."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []  # (whole buffer as bytes, what its margins were)

    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor` with margins."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that holds what the margins hold: what a kernel leaves unwritten shows."""
        margin = _MARGIN // dtype.itemsize
        size = torch.Size(shape).numel()
        buffer = torch.zeros(size + 2 * margin, dtype=dtype)
        if dtype.is_floating_point:
            buffer.fill_(float("nan"))
        else:
            buffer.view(torch.uint8).fill_(_BYTE)
        self._buffers.append((buffer.view(torch.uint8), _margins(buffer.view(torch.uint8)).clone()))
        return buffer[margin : margin + size].view(shape)

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """Guard what torch.empty makes."""

        def empty(*size: int, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
            return self.empty(size, dtype)

        with patch.object(torch, "empty", empty):
            yield

    def __enter__(self) -> Canaries:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if kind is None:
            for number, (buffer, before) in enumerate(self._buffers):
                assert torch.equal(_margins(buffer), before), f"guarded tensor {number}: written outside its bounds"


def before_a_wall(tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor` that ends where memory ends: reading further kills the process."""
    inside = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, inside))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0):  # PROT_NONE
        raise OSError(ctypes.get_errno(), "mprotect")
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=inside - tensor.nbytes)
    return view.view(tensor.shape).copy_(tensor)


def _margins(buffer: Tensor) -> Tensor:
    return torch.cat((buffer[:_MARGIN], buffer[-_MARGIN:]))
