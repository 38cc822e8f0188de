"""Our experts on the processor against transformers' three implementations, and against what the machine can do.

    python scripts/bench/cpu_experts.py [--shapes qwen3-30b-a3b mixtral-8x7b] [--tokens 1 8 64 512] [--dtypes bf16 fp32]
        [--threads 2] [--rounds 60] [--budget 30] [--json FILE]

One layer of routed experts, all its weights in memory, as transformers has them. Contestants take turns on the same
calls, each of which has experts of its own; before every one the caches are filled with something else. Ratios are made
within a round; of transformers' implementations the one with the smallest median counts. One that takes more than three
times as long as the best in the first round is not asked again, and one that would need more memory than there is, is
left out (batched_mm copies the weights of every row). At least 1.0x is asked everywhere.

The last columns: for few rows of an expert the weights' bytes per second as a share of the memory's (the better of a
large copy and a large read), for many the operations per second as a share of a large product's in the fastest dtype;
both measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from _common import arguments, conditions, listen_for_noise, p50, print_head, print_table, write_json
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moehive.kernels.benchmark.layers import Call, make_calls
from moehive.kernels.benchmark.machine import Ceilings, measure_ceilings
from moehive.kernels.benchmark.shapes import FORMATS, SHAPES, LayerShape
from moehive.kernels.cpu.experts import Expert, run_experts
from moehive.kernels.cpu.packed import can_pack, pack_expert
from moehive.kernels.expert_ffn import ExpertWeights

THEIRS = ("eager", "batched_mm", "grouped_mm")
OURS = (
    "moehive",
    "packed",
)  # on transformers' own weights; and on copies in oneDNN's layout: optimize(model, pack=True)
HOPELESS = 3.0  # times the best
LEAST = 2  # rounds; the slowest lines take a minute for one
CACHE = 1 << 26  # elements of fp32 that are read before each call: far more than any cache holds
TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 1e-5}  # between contestants, of the largest output
MEMORY_SHARE = 0.5  # of the free memory that a contestant may take

Run = Callable[[Call], Tensor]


@dataclass(frozen=True)
class Result:
    """One line: seconds are medians; ratios are theirs over ours."""

    shape: str
    dtype: str
    tokens: int
    active: int
    seconds: dict[str, float | None]
    best: str
    ratio: float
    packed: float | None
    least: float
    most: float
    rounds: int
    foreign: float
    of_bandwidth: float
    of_rate: float


def make_layer(shape: LayerShape, dtype: torch.dtype) -> Any:
    """transformers' experts with the shape's sizes. The class is Mixtral's; Qwen3-MoE's has the same code."""
    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k, hidden_act="silu", experts_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        layer: Any = MixtralExperts(config)
    for name, parameter in list(layer.named_parameters()):
        one = torch.randn(parameter.shape[1:]).mul_(parameter.shape[-1] ** -0.5).to(dtype)
        weight = torch.empty(parameter.shape, dtype=dtype)  # [E, N, K]
        for number, expert in enumerate(weight):
            expert.copy_(one.roll(number, 0))  # each in memory of its own, and different
        setattr(layer, name, torch.nn.Parameter(weight, requires_grad=False))
    return layer


def contestants(shape: LayerShape, layer: Any) -> dict[str, Run]:
    """Ours first. All have the same weights, in the same memory."""
    experts = [
        ExpertWeights(gate_up, down).matrices(shape.spec)
        for gate_up, down in zip(layer.gate_up_proj.data, layer.down_proj.data, strict=True)
    ]

    def ours(experts: Sequence[Expert]) -> Run:
        return lambda call: run_experts(call.hidden, call.index, call.weights, experts, shape.spec)

    def theirs(name: str) -> Run:
        def run(call: Call) -> Tensor:
            layer.config._experts_implementation = name
            out: Tensor = layer(call.hidden, call.index, call.weights.to(call.hidden.dtype))
            return out

        return run

    runs = {"moehive": ours(experts), **{name: theirs(name) for name in THEIRS}}
    if can_pack() and layer.down_proj.dtype == torch.bfloat16:
        runs["packed"] = ours([pack_expert(expert) for expert in experts])
    return runs


def fits(name: str, shape: LayerShape, tokens: int, dtype: torch.dtype) -> bool:
    """batched_mm gathers gate_up for every row, and keeps it until down is gathered, too."""
    needed = 3 * shape.hidden * shape.inner * dtype.itemsize * tokens * shape.top_k if name == "batched_mm" else 0
    return needed <= MEMORY_SHARE * psutil.virtual_memory().available


class Race:
    """The contestants of one line of the table, taking turns."""

    def __init__(self, shape: LayerShape, tokens: int, dtype: torch.dtype, runs: Mapping[str, Run]) -> None:
        self.calls = make_calls(shape, tokens, 8, torch.device("cpu"), dtype)
        self.runs = {name: run for name, run in runs.items() if fits(name, shape, tokens, dtype)}
        self.times: dict[str, list[float]] = {name: [] for name in self.runs}
        self.cache = torch.zeros(CACHE)

    def check(self, tolerance: float) -> None:
        """All compute the same; also warms up. Raises ValueError where they do not, and leaves out who is hopeless."""
        times, outputs = {}, {}
        for name, run in self.runs.items():
            start = time.perf_counter()
            outputs[name] = run(self.calls[0])
            times[name] = time.perf_counter() - start
            error = float((outputs[name] - outputs["moehive"]).abs().max() / outputs["moehive"].abs().max())
            if error > tolerance:
                raise ValueError(f"{name} differs from moehive by {error:.1e}")
        best = min(seconds for name, seconds in times.items() if name in THEIRS)
        for name, seconds in times.items():
            if name in THEIRS and seconds > HOPELESS * best:
                self.times[name].append(seconds)
                del self.runs[name]

    def run(self, rounds: int, budget: float) -> None:
        """At least LEAST rounds, then as many as the time allows."""
        names, end = list(self.runs), time.perf_counter() + budget
        for number in range(rounds):
            if number >= LEAST and time.perf_counter() > end:
                break
            call = self.calls[number % len(self.calls)]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                self.cache.sum()
                start = time.perf_counter()
                self.runs[name](call)
                self.times[name].append(time.perf_counter() - start)


def measure(
    shape: LayerShape, dtype_name: str, tokens: int, runs: Mapping[str, Run], ceilings: Ceilings, options: Any
) -> Result:
    """One line of the table."""
    dtype = FORMATS[dtype_name].dtype
    race = Race(shape, tokens, dtype, runs)
    race.check(TOLERANCE[dtype])
    with listen_for_noise() as noise:
        race.run(options.rounds, options.budget)
    medians = {name: p50(race.times[name]) if race.times.get(name) else None for name in (*OURS, *THEIRS)}
    best = min((name for name in race.runs if name in THEIRS), key=lambda name: p50(race.times[name]))
    own = race.times["moehive"]
    ratios = ratios_of(race.times[best], own)
    packed = p50(ratios_of(race.times[best], race.times["packed"])) if "packed" in runs else None
    active = race.calls[0].active
    weights = active * shape.kept_as(FORMATS[dtype_name]).expert_bytes
    return Result(
        shape.name, dtype_name, tokens, active, medians, best, p50(ratios), packed, min(ratios), max(ratios), len(own),
        noise.foreign, weights / p50(own) / ceilings.bandwidth,
        shape.flops(tokens * shape.top_k) / p50(own) / ceilings.rate,
    )  # fmt: skip


def ratios_of(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Theirs over ours, round by round."""
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def row(result: Result) -> list[object]:
    """As the table has it."""
    times = [None if seconds is None else seconds * 1e3 for seconds in result.seconds.values()]
    return [
        f"{result.shape} {result.dtype}", result.tokens, *times, result.best, f"{result.ratio:.2f}",
        None if result.packed is None else f"{result.packed:.2f}",
        f"{result.least:.2f} to {result.most:.2f}", result.rounds, f"{result.of_bandwidth:.0%}",
        f"{result.of_rate:.0%}", f"{result.foreign:.0%}",
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=60)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b", "mixtral-8x7b"], choices=sorted(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for one line, after its first rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    ceilings = measure_ceilings(torch.device("cpu"))
    rates = f"{ceilings.bandwidth / 1e9:.1f} GB/s, {ceilings.rate / 1e9:.0f} GFLOP/s"
    facts = conditions(threads=options.threads, isa=torch.backends.cpu.get_cpu_capability(), ceilings=rates)
    print_head("Experts on the processor", facts)
    results = []
    for shape in (SHAPES[name] for name in options.shapes):
        for dtype in options.dtypes:
            layer = make_layer(shape, FORMATS[dtype].dtype)
            runs = contestants(shape, layer)
            for tokens in options.tokens:
                results.append(measure(shape, dtype, tokens, runs, ceilings, options))
                write_json(options.json, facts, [asdict(result) for result in results])  # it may take long: keep all
            del layer, runs  # before the next one is made: both would not fit
    names = [f"{name} ms" for name in (*OURS, *THEIRS)]
    columns = [
        "layer",
        "tokens",
        *names,
        "best of theirs",
        "ratio",
        "packed",
        "spread",
        "rounds",
        "of bandwidth",
        "of rate",
    ]
    print_table([*columns, "others' CPU"], [row(result) for result in results])


if __name__ == "__main__":
    main()
