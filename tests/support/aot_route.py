"""The builds of the routing kernels that are compiled ahead of time and held to limits: one for each kind of router."""

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


def _route(name: str, spec: RouterSpec, sm: int) -> Build:
    logits = torch.float32 if spec.correction_bias else torch.bfloat16
    pointers = {
        "logits": "*fp32:16" if spec.correction_bias else "*bf16:16",
        "bias": "*fp32:16" if spec.correction_bias else None,
        "weights": "*bf16:16" if spec.weights_in_hidden_dtype else "*fp32:16",
        "experts": "*i32:16",
        "tokens": "i32",
        "stride": "i32:16" if spec.num_experts % 16 == 0 else "i32",
    }
    kernel = "moehive.kernels.gpu.route:route_kernel"
    return Build(f"route {name} sm_{sm}", kernel, sm, pointers | route_constants(spec, logits), num_warps=1)


def _capacity(sm: int) -> Build:
    arguments = {"weights": "*fp32:16", "experts": "*i32:16", "length": "i32", "capacity": "i32"}
    constants = {"E": 64, "TOP_K": 2, "TOKENS": 64, "EXPERTS": 32}
    return Build(f"capacity sm_{sm}", "moehive.kernels.gpu.route:capacity_kernel", sm, arguments | constants)


BUILDS = [
    *(_route(name, spec, sm) for sm in (80, 90) for name, spec in ROUTERS.items()),
    *(_capacity(sm) for sm in (80, 90)),
]
