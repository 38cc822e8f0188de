"""Experts that stay quantised on the processor: against widening each one before its products, and against bf16.

    python scripts/bench/cpu_quantised.py [--shape qwen3-30b-a3b] [--formats fp8 int8 int4 mxfp4] [--tokens 1 8 64]
        [--threads 2] [--rounds 20] [--budget 5] [--json FILE]

transformers has no products over quantised experts on a processor: a checkpoint is widened to bf16 when it is loaded
("bf16": two to four times the memory), or an expert is widened whole for each use ("widened"). Contestants take turns
on the same calls, with the caches filled with something else before each. Asked is at least 1.0x of "widened".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil
import torch
from _common import arguments, conditions, listen_for_noise, p50, print_head, print_table, write_json
from cpu_experts import CACHE, Run, ratios_of
from torch import Tensor

from moehive.kernels.benchmark.layers import Call, make_calls, make_experts
from moehive.kernels.benchmark.shapes import FORMATS, SHAPES, LayerShape
from moehive.kernels.cpu.experts import run_experts
from moehive.kernels.dequantize import dequantize
from moehive.kernels.expert_ffn import apply_gate
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix
from moehive.kernels.routing import sort_rows

TOLERANCE = 2**-5  # of the largest output
MEMORY = 4e9  # bytes of experts in bf16


@dataclass(frozen=True)
class Result:
    """One line: seconds are medians; ratios are theirs over ours."""

    shape: str
    format: str
    tokens: int
    seconds: Mapping[str, float]
    of_widened: float
    of_bf16: float
    memory: float  # bytes of bf16 weights over those that are held
    rounds: int
    foreign: float


def in_bf16(matrix: WeightMatrix) -> WeightMatrix:
    """The same values."""
    return WeightMatrix(WeightFormat.PLAIN, dequantize(matrix, torch.bfloat16))


def widen_and_run(call: Call, experts: Sequence[ExpertMatrices], shape: LayerShape) -> Tensor:
    """What is done without products over quantised weights: each active expert in bf16, for as long as it is used."""
    rows = sort_rows(call.index, len(experts))
    total = torch.zeros(call.hidden.shape)  # [T, H]
    start = 0
    for number, count in zip(rows.experts, rows.counts, strict=True):
        part = rows.part(slice(0, 0), slice(start, start + count))
        gate_up, down = (
            dequantize(matrix, torch.bfloat16) for matrix in (experts[number].gate_up, experts[number].down)
        )
        inner = apply_gate(call.hidden[part.token] @ gate_up.t(), shape.spec)  # [n, I]
        weights = call.weights[part.token, part.position]  # [n]
        total.index_add_(0, part.token, (inner @ down.t()).float() * weights[:, None])
        start += count
    return total.to(call.hidden.dtype)


def contestants(shape: LayerShape) -> tuple[dict[str, Run], float]:
    """Ours first, and how many times the memory the weights have in bf16."""
    layer = make_experts(shape, torch.device("cpu"), MEMORY * shape.stored.weight_bytes / 2)
    wide = [ExpertMatrices(in_bf16(e.gate_up), in_bf16(e.down)) for e in layer.every[: layer.held]]
    every = [wide[number % layer.held] for number in range(shape.experts)]

    def run(experts: Sequence[ExpertMatrices]) -> Callable[[Call], Tensor]:
        return lambda call: run_experts(call.hidden, call.index, call.weights, experts, shape.spec)

    runs = {
        "moehive": run(layer.every),
        "widened": lambda call: widen_and_run(call, layer.every, shape),
        "bf16": run(every),
    }
    return runs, sum(e.nbytes for e in wide) / layer.nbytes


def race(runs: Mapping[str, Run], calls: Sequence[Call], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each round. Raises ValueError where results differ."""
    outputs = {name: run(calls[0]) for name, run in runs.items()}
    for name, output in outputs.items():
        error = float((output - outputs["moehive"]).abs().max() / outputs["moehive"].abs().max())
        if error > TOLERANCE:
            raise ValueError(f"{name} differs from moehive by {error:.1e}")
    cache, end = torch.zeros(CACHE), time.perf_counter() + budget
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        if number >= 2 and time.perf_counter() > end:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cache.sum()
            start = time.perf_counter()
            runs[name](calls[number % len(calls)])
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(SHAPES))
    parser.add_argument("--formats", nargs="+", default=["fp8", "int8", "int4", "mxfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for one line, after its first rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    facts = conditions(threads=options.threads, isa=torch.backends.cpu.get_cpu_capability())
    print_head("Quantised experts on the processor", facts)
    results = []
    for name in options.formats:
        shape = SHAPES[options.shape].kept_as(FORMATS[name])
        runs, memory = contestants(shape)
        for tokens in options.tokens:
            with listen_for_noise() as noise:
                times = race(runs, make_calls(shape, tokens, 8, torch.device("cpu")), options.rounds, options.budget)
            ratios = [p50(ratios_of(times[other], times["moehive"])) for other in ("widened", "bf16")]
            seconds = {name: p50(some) for name, some in times.items()}
            rounds = len(times["moehive"])
            results.append(Result(shape.name, name, tokens, seconds, *ratios, memory, rounds, noise.foreign))
        del runs
    write_json(options.json, facts, [asdict(result) for result in results])
    columns = ["layer", "tokens", "moehive ms", "widened ms", "bf16 ms", "of widened", "of bf16", "memory", "rounds"]
    print_table([*columns, "others' CPU"], [row(result) for result in results])


def row(result: Result) -> list[object]:
    """As the table has it."""
    return [
        f"{result.shape} {result.format}", result.tokens, *(seconds * 1e3 for seconds in result.seconds.values()),
        f"{result.of_widened:.2f}", f"{result.of_bf16:.2f}", f"1/{result.memory:.1f}", result.rounds,
        f"{result.foreign:.0%}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
