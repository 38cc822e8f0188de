"""One MoE layer of Qwen3-30B-A3B's shape (hidden 2048, experts of 768, top-8) for the benchmarks of expert requests.

A real Qwen3-MoE checkpoint in the hub's form with random weights, written directly and converted by moehive; only as
many experts as fit a small machine, which is no matter: a token uses eight whatever their number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import Assignment, group_by_expert
from moehive.protocol.ids import ExpertKey
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.model.backend import ExpertLoader
from moehive.swarm.store.directory import ConvertedDirectory

HIDDEN, INTERMEDIATE, TOP_K, EXPERTS = 2048, 768, 8, 16
SPEC = FfnSpec()
_CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "num_hidden_layers": 1, "vocab_size": 256, "dtype": "bfloat16",
}  # fmt: skip
_PROJECTIONS = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def make_model(directory: Path) -> Path:
    """Write the checkpoint, convert it, and return the converted directory (both inside `directory`)."""
    source, converted = directory / "source", directory / "converted"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(_CONFIG))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(256, HIDDEN, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for expert in range(EXPERTS):
        for name, shape in _PROJECTIONS.items():
            weight = torch.randn(shape, generator=generator) * 0.02
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = weight.bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, converted)
    return converted


def load_weights(converted: Path, dtype: torch.dtype) -> Mapping[int, ExpertWeights]:
    """All experts in memory, as a node has them."""
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    return {expert: loader.load(ExpertKey(0, expert), dtype) for expert in range(EXPERTS)}


@dataclass(frozen=True, slots=True)
class Token:
    """One token and its routing."""

    hidden: Tensor  # [1, H]
    index: Tensor  # [1, K]
    weights: Tensor  # [1, K]

    @property
    def call(self) -> LayerInput:
        """The token as the layer's input, with one row back."""
        return LayerInput(0, self.hidden, self.weights, "sum")

    @property
    def assignments(self) -> list[Assignment]:
        """Its experts."""
        return group_by_expert(self.index, EXPERTS)


def make_tokens(count: int, dtype: torch.dtype) -> Sequence[Token]:
    """The same tokens in every process: random rows, each routed to eight random experts."""
    generator = torch.Generator().manual_seed(1)
    tokens = []
    for _ in range(count):
        hidden = torch.randn(1, HIDDEN, generator=generator).to(dtype)
        index = torch.randperm(EXPERTS, generator=generator)[None, :TOP_K]
        weights = torch.rand(1, TOP_K, generator=generator)
        tokens.append(Token(hidden, index, (weights / weights.sum()).to(dtype)))
    return tokens


def compute(token: Token, experts: Mapping[int, ExpertWeights]) -> Tensor:
    """The layer's output [1, H] with no more work than it takes: what a request is compared with."""
    total = torch.zeros(1, HIDDEN)
    for expert, weight in zip(token.index[0].tolist(), token.weights[0].tolist(), strict=True):
        total.add_(expert_ffn(token.hidden, experts[expert], SPEC), alpha=weight)
    return total.to(token.hidden.dtype)
