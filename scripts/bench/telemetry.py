"""What counting the use of experts costs, as a share of the layer that it counts in.

    python scripts/bench/telemetry.py [--rounds 5] [--json FILE]

Layers of the bundled demo model's shape and of Qwen3-30B-A3B's, one token and many, on the processor with one thread;
the layer is its routed experts alone, with everything in memory, which makes the share as large as it can be.
Under 1 % of a layer of a real model is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import arguments, conditions, p50, print_head, print_table, repeat, write_json
from torch import Tensor

from moehive.kernels.combine import combine_rows
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import group_by_expert
from moehive.kernels.telemetry import LayerLoad

_SECONDS = 0.3  # of one measurement


@dataclass(frozen=True)
class Shape:
    """One layer and how many tokens pass at once."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    tokens: int


SHAPES = [
    Shape("demo", 160, 160, 8, 2, 1),
    Shape("demo", 160, 160, 8, 2, 256),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, 1),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, 256),
]


def measure(shape: Shape) -> dict[str, float]:
    """Seconds of one call of the layer and of its count."""
    generator = torch.Generator().manual_seed(0)
    held = min(shape.num_experts, 16)  # distinct weights; all experts of a larger layer would not fit small machines
    weights = [
        ExpertWeights(
            torch.randn(2 * shape.inner, shape.hidden, generator=generator).bfloat16(),
            torch.randn(shape.hidden, shape.inner, generator=generator).bfloat16(),
        )
        for _ in range(held)
    ]
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator).bfloat16()
    scores, experts = torch.rand(shape.tokens, shape.num_experts, generator=generator).topk(shape.top_k)

    def layer() -> Tensor:
        groups = group_by_expert(experts, shape.num_experts)
        outputs = ((g, expert_ffn(hidden[g.token], weights[g.expert % held], FfnSpec())) for g in groups)
        return combine_rows(torch.zeros_like(hidden), outputs, scores)

    load = LayerLoad(shape.num_experts)
    return {"layer": seconds(layer), "count": seconds(lambda: load.count(experts))}


def seconds(call: Callable[[], object]) -> float:
    """The fastest of the calls that fit into a while: what others do meanwhile only makes calls slower."""
    call()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Print the table."""
    options = arguments(__doc__, rounds=5).parse_args()
    torch.set_num_threads(1)
    facts = conditions(threads=1, dtype="bfloat16")
    print_head("The cost of counting", facts)
    rows, results = [], []
    for shape in SHAPES:
        rounds = repeat(options.rounds, lambda shape=shape: measure(shape))
        layer, count = (p50([one[name] for one in rounds.results]) for name in ("layer", "count"))
        rows.append([shape.name, shape.tokens, layer * 1e6, count * 1e6, 100 * count / layer])
        results.append({"shape": shape.name, "tokens": shape.tokens, "layer_s": layer, "count_s": count})
    print_table(["layer", "tokens", "layer us", "count us", "share %"], rows)
    write_json(options.json, facts, results)


if __name__ == "__main__":
    main()
