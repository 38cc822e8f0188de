"""Seconds of a layer on a GPU, from CUDA graphs that hold many different calls; and the machine's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .data import Call
from .roofline import Ceilings

REPLAYS = 7


def calls_in_graph(tokens: int) -> int:
    """Enough to make a launch of the graph nothing, and few enough to be quick."""
    return 16 if tokens <= 64 else 6 if tokens <= 512 else 2


def seconds_per_call(run: Callable[[Call], Any], calls: Sequence[Call], device: torch.device) -> float:
    """Median over replays of a graph of all `calls`. On a CPU, to show that everything runs: once, by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            run(call)
        return (time.perf_counter() - start) / len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            run(call)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            run(call)
    graph.replay()
    times = [_elapsed(graph.replay) for _ in range(REPLAYS)]
    return statistics.median(times) / len(calls)


def microseconds_per_call(run: Callable[[Call], Any], calls: Sequence[Call], device: torch.device) -> float:
    """The same in the unit of the table."""
    return seconds_per_call(run, calls, device) * 1e6


def _elapsed(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings() -> Ceilings:
    """A copy of 2 GiB, and a product of 8192 x 8192 x 8192 in bf16."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    for _ in range(3):
        target.copy_(source)
        left @ right
    copy = statistics.median(_elapsed(lambda: target.copy_(source)) for _ in range(10))
    product = statistics.median(_elapsed(lambda: left @ right) for _ in range(10))
    return Ceilings(2 * source.numel() / copy, 2 * 8192**3 / product)
