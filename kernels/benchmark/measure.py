"""One layer on one number of tokens: time against the roofline, use of the experts, peak memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moehive.kernels.cpu.experts import run_experts
from moehive.kernels.telemetry import LayerLoad

from .layers import Call, Experts, make_calls
from .machine import Ceilings, seconds_of
from .shapes import LayerShape

Run = Callable[[Call], Tensor]

_CALLS: Final = 8  # different ones
_GRAPH_CALLS: Final = 16  # of CUDA: enough to make the launch of a graph nothing
_REPLAYS: Final = 7


@dataclass(frozen=True, slots=True)
class Measurement:
    """seconds: median of a call. active: experts that a call hits, on average.

    bandwidth: bytes per second, of weights and activations that have to be moved. rate: floating-point operations per
    second. of_roofline: the least time at the machine's ceilings over the measured one.
    utilisation, gini: of the experts in one call, on average (`kernels.telemetry.LoadStatistics`).
    weight_bytes: of the layer's experts. peak_bytes: those, and the most that one call had allocated.
    dense_bytes: what a dense layer with as many parameters would need (`LayerShape.dense_bytes`).
    """

    shape: str
    format: str
    tokens: int
    seconds: float
    active: float
    bandwidth: float
    rate: float
    of_roofline: float
    utilisation: float
    gini: float
    weight_bytes: float
    peak_bytes: float
    dense_bytes: float

    @property
    def tokens_per_second(self) -> float:
        """Of this one layer."""
        return self.tokens / self.seconds


def measure_layer(
    shape: LayerShape, format_name: str, experts: Experts, tokens: int, ceilings: Ceilings, device: torch.device,
    *, budget: float,
) -> Measurement:  # fmt: skip
    """Measure calls with `tokens` tokens, for `budget` seconds or three calls on a processor; inputs are bf16.

    On a processor experts in fp32 get fp32 inputs.
    """
    plain = shape.stored.dtype is torch.float32
    dtype = torch.float32 if plain else torch.bfloat16
    calls = make_calls(shape, tokens, _CALLS, device, dtype)
    run = _runner(shape, experts, device)
    peak = peak_bytes(lambda: run(calls[0]), device)
    seconds = _graph_seconds(run, calls, device) if device.type == "cuda" else _typical(run, calls, budget)
    loads = [_load_of(call, shape) for call in calls]
    active = statistics.fmean(call.active for call in calls)
    moved = shape.bytes_moved(tokens, round(active), dtype.itemsize)
    flops = shape.flops(tokens * shape.top_k)
    weights = shape.experts * shape.expert_bytes
    utilisation, gini = (statistics.fmean(part) for part in zip(*loads, strict=True))
    return Measurement(
        shape.name, format_name, tokens, seconds, active, moved / seconds, flops / seconds,
        ceilings.seconds(moved, flops) / seconds, utilisation, gini, weights, weights + peak,
        shape.dense_bytes(tokens, dtype.itemsize),
    )  # fmt: skip


def _load_of(call: Call, shape: LayerShape) -> tuple[float, float]:
    load = LayerLoad(shape.experts)
    load.count(call.index)
    found = load.statistics()
    return found.utilisation, found.gini


def _runner(shape: LayerShape, experts: Experts, device: torch.device) -> Run:
    if device.type != "cuda":
        return lambda call: run_experts(call.hidden, call.index, call.weights, experts.every, shape.spec)
    from moehive.kernels.gpu.experts import run_experts as run_on_gpu  # imports triton
    from moehive.kernels.gpu.table import ExpertTable

    table = ExpertTable.of(experts.every, device)
    return lambda call: run_on_gpu(call.hidden, call.index, call.weights, table, shape.spec)


def _typical(run: Run, calls: list[Call], budget: float) -> float:
    """The median over calls in turn: three at least, then as many as `budget` seconds allow."""
    device, times = torch.device("cpu"), []
    end = time.perf_counter() + budget
    for call in _again_and_again(calls):
        times.append(seconds_of(lambda call=call: run(call), device))  # type: ignore[misc]
        if len(times) >= 3 and time.perf_counter() > end:
            break
    return statistics.median(times)


def _again_and_again(calls: list[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def _graph_seconds(run: Run, calls: list[Call], device: torch.device) -> float:
    """The median over replays of a CUDA graph that holds all calls: what the kernels take, without Python."""
    run(calls[0])  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    sequence = (calls * _GRAPH_CALLS)[: max(_GRAPH_CALLS, len(calls))]
    with torch.cuda.graph(graph):
        for call in sequence:
            run(call)
    graph.replay()
    return statistics.median(seconds_of(graph.replay, device) for _ in range(_REPLAYS)) / len(sequence)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch had allocated at a time during `call`, beyond those at its beginning."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorded = _Allocations()
    with recorded:
        result = call()
    del result
    return recorded.highest


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that come into being while it is on and have not gone yet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operator: what it returns is new unless it shares the memory of an argument."""
        kwargs = kwargs or {}
        given = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if id(storage) not in given:
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes()).atexit = False
        return out

    def _change(self, size: int) -> None:
        self.held += size
        self.highest = max(self.highest, self.held)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
