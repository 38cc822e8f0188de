"""What this machine can do at most, measured: bytes moved and operations computed per second; and how time is taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

_COPY_BYTES: Final = {"cpu": 1 << 28, "cuda": 1 << 31}  # far more than any cache
_PRODUCT: Final = {"cpu": 2048, "cuda": 8192}  # sides of the matrices
_REPEATS: Final = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bandwidth: bytes per second, of the better of a large copy (read plus written) and of a large read.

    rate: floating-point operations per second of a large dense product, in the dtype in which the machine is fastest.
    """

    bandwidth: float
    rate: float

    def seconds(self, moved: float, flops: float) -> float:
        """The least time for so many bytes and operations, if both are done at once at their ceilings: the roofline."""
        return max(moved / self.bandwidth, flops / self.rate)


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """The ceilings of `device` with torch's current number of threads. `quick`: small, and not reliable."""
    size, side = (1 << 22, 256) if quick else (_COPY_BYTES[device.type], _PRODUCT[device.type])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    copy = typical_seconds(lambda: target.copy_(source), device, _REPEATS)
    read = typical_seconds(words.sum, device, _REPEATS)
    products = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        products.append(_fastest(lambda left=left, right=right: left @ right, device))  # type: ignore[misc]
    return Ceilings(max(2 * size / copy, size / read), 2 * side**3 / min(products))


def typical_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of `repeats` calls, after one that does not count."""
    call()
    return statistics.median(seconds_of(call, device) for _ in range(repeats))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """One call by the clock, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Median time; a slow dtype is found out by its first call."""
    first = seconds_of(call, device)
    return first if first > 1.0 else typical_seconds(call, device, _REPEATS)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
