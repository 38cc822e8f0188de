"""The builds of the routing kernels that are compiled ahead of time and held to limits.

ROUTE: every kind of router, in the sizes of published models. ALIGN: rows to experts and back.
"""

from __future__ import annotations

import torch
from support.aot import Build

from moehive.kernels.gpu.route import route_constants
from moehive.kernels.router import GroupScore, RouterSpec, Score

ROUTERS = {
    "Mixtral": RouterSpec(8, 2, normalize=True),
    "Qwen3-30B-A3B": RouterSpec(128, 8, normalize=True, weights_in_hidden_dtype=True),
    "Qwen3-Next": RouterSpec(512, 10, normalize=True, weights_in_hidden_dtype=True),
    "GPT-OSS-120B": RouterSpec(128, 4, score=Score.TOP_K_SOFTMAX, weights_in_hidden_dtype=True),
    "Phi-3.5-MoE": RouterSpec(16, 2, score=Score.SPARSEMIXER, weights_in_hidden_dtype=True),
    "DeepSeek-V2": RouterSpec(160, 6, groups=8, top_groups=3, group_score=GroupScore.MAX, scale=16.0),
    "DeepSeek-V3": RouterSpec(
        256, 8, score=Score.SIGMOID, correction_bias=True, groups=8, top_groups=4, normalize=True, eps=1e-20, scale=2.5
    ),
    "Kimi-K2": RouterSpec(384, 8, score=Score.SIGMOID, correction_bias=True, normalize=True, eps=1e-20, scale=2.827),
}
_MODULES = "moehive.kernels.gpu"
_INT = "*i32:16"


def _route(name: str, spec: RouterSpec, sm: int) -> Build:
    logits = torch.float32 if spec.correction_bias else torch.bfloat16
    arguments = {
        "logits": "*fp32:16" if spec.correction_bias else "*bf16:16",
        "bias": "*fp32:16" if spec.correction_bias else None,
        "weights": "*bf16:16" if spec.weights_in_hidden_dtype else "*fp32:16",
        "experts": _INT,
        "tokens": "i32",
        "stride": "i32:16" if spec.num_experts % 16 == 0 else "i32",
    }
    constants = route_constants(spec, logits)
    return Build(f"route {name} sm_{sm}", f"{_MODULES}.route:route_kernel", sm, arguments | constants, num_warps=1)


def _capacity(sm: int) -> Build:
    arguments = {"weights": "*fp32:16", "experts": _INT, "length": "i32", "capacity": "i32"}
    constants = {"E": 64, "TOP_K": 2, "TOKENS": 64, "EXPERTS": 32}
    return Build(f"capacity sm_{sm}", f"{_MODULES}.route:capacity_kernel", sm, arguments | constants)


def _choose(sm: int) -> Build:
    arguments = {"scores": "*fp32:16", "chosen": _INT, "weights": "*fp32:16", "tokens": "i32", "capacity": "i32"}
    kernel = f"{_MODULES}.expert_choice:choose_kernel"
    return Build(f"expert choice sm_{sm}", kernel, sm, arguments | {"TOKENS": 4096}, num_warps=8)


def _softmax(sm: int) -> Build:
    arguments = {"logits": "*bf16:16", "scores": "*fp32:16", "tokens": "i32", "stride": "i32:16"}
    kernel = f"{_MODULES}.expert_choice:softmax_by_expert_kernel"
    return Build(f"expert softmax sm_{sm}", kernel, sm, arguments | {"E": 64, "EP": 64, "BLOCK": 32})


def _align(num_experts: int, sm: int) -> list[Build]:
    """All ways of aligning; `num_experts` is a power of two, as EP is."""
    given = {"experts": "*i64:16", "expert_map": _INT}
    result = {"rows": _INT, "block_expert": _INT}
    common = {"num_rows": "i32", "E": num_experts, "HAS_MAP": True}
    sizes = {"EP": num_experts, "ROWS": 512}
    usage = {"usage": "*i64:16", "HAS_USAGE": True}
    count, counts, starts = {"count": _INT}, {"counts": _INT}, {"starts": _INT}
    prefix = {"rows": _INT, "chunks": "i32", "num_rows": "i32", "E": num_experts, "EP": num_experts, "BM": 128}
    prefix |= {"CHUNKS": 4096 // num_experts}
    step = {"STEP": min(4096 // num_experts, 16)}
    tail = {"BM": 16, "BLOCKS": 16}
    lone = {"block_expert": _INT, "BLOCK": 128}
    parts = {
        "align": (given | result | count | usage | common | sizes | tail | step, 8),
        "count": (given | counts | common | sizes, 4),
        "prefix": (counts | starts | count | usage | prefix | step, 8),
        "scatter": (given | counts | starts | result | common | sizes | tail, 4),
        "local_experts": (given | usage | common | lone, 1),
    }
    return [
        Build(f"{name} {num_experts} sm_{sm}", f"{_MODULES}.align:{name}_kernel", sm, arguments, num_warps=warps)
        for name, (arguments, warps) in parts.items()
    ]


def _combine(top_k: int, splits: int, sm: int) -> Build:
    arguments = {
        "outputs": "*fp32:16" if splits > 1 else "*bf16:16", "experts": "*i64:16", "expert_map": _INT, "weights": None,
        "out": "*bf16:16", "num_rows": "i32", "H": "i32:16", "E": 128, "TOP_K": top_k, "SPLITS": splits,
        "HAS_MAP": True, "HAS_WEIGHTS": False, "K": 8, "COLUMNS": 512,
    }  # fmt: skip
    kernel = f"{_MODULES}.combine:combine_kernel"
    return Build(f"combine {top_k} of {splits} sm_{sm}", kernel, sm, arguments, num_warps=1)


ROUTE = [
    *(_route(name, spec, 90) for name, spec in ROUTERS.items()),
    *(_route(name, ROUTERS[name], 80) for name in ("Qwen3-30B-A3B", "DeepSeek-V3")),
    *(make(sm) for sm in (80, 90) for make in (_capacity, _choose, _softmax)),
]
ALIGN = [
    *_align(128, 90),
    *_align(512, 90),
    *_align(128, 80),
    *(_combine(top_k, splits, 90) for top_k, splits in ((8, 1), (6, 4))),
    _combine(8, 1, 80),
]
BUILDS = ROUTE + ALIGN
