"""One MoE layer of a published model's shape for the benchmarks of expert requests.

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
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.store.directory import ConvertedDirectory

SPEC = FfnSpec()


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer, and how many of its experts the benchmark has."""

    name: str
    hidden: int
    intermediate: int
    top_k: int
    experts: int

    def __str__(self) -> str:
        return f"{self.name}: hidden {self.hidden}, ffn {self.intermediate}, top-{self.top_k} of {self.experts} experts"


QWEN3 = Shape("Qwen3-30B-A3B", 2048, 768, 8, 16)
DEEPSEEK = Shape("DeepSeek-V3", 7168, 2048, 8, 9)
SHAPES = {"qwen3": QWEN3, "deepseek": DEEPSEEK}


def make_model(directory: Path, shape: Shape = QWEN3) -> Path:
    """Write the checkpoint, convert it, and return the converted directory (both inside `directory`)."""
    hidden, intermediate = shape.hidden, shape.intermediate
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "moe_intermediate_size": intermediate, "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k, "num_hidden_layers": 1, "vocab_size": 256, "dtype": "bfloat16",
    }  # fmt: skip
    projections = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    source, converted = directory / "source", directory / "converted"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(256, hidden, dtype=torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for expert in range(shape.experts):
        for name, size in projections.items():
            weight = torch.randn(size, generator=generator) * 0.02
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = weight.bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, converted)
    return converted


def load_weights(converted: Path, dtype: torch.dtype) -> Mapping[int, ExpertWeights]:
    """All experts in memory, as a node has them."""
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    return {key.expert: loader.load(key, dtype) for key in sorted(directory.manifest.experts)}


@dataclass(frozen=True, slots=True)
class Token:
    """One token and its routing."""

    hidden: Tensor  # [1, H]
    index: Tensor  # [1, K]
    weights: Tensor  # [1, K]
    shape: Shape

    @property
    def call(self) -> LayerInput:
        """The token as the layer's input, with one row back."""
        return LayerInput(0, self.hidden, self.weights, "sum")

    @property
    def assignments(self) -> list[Assignment]:
        """Its experts."""
        return group_by_expert(self.index, self.shape.experts)


def make_tokens(count: int, dtype: torch.dtype, shape: Shape = QWEN3) -> Sequence[Token]:
    """The same tokens in every process: random rows, each routed to random experts."""
    generator = torch.Generator().manual_seed(1)
    tokens = []
    for _ in range(count):
        hidden = torch.randn(1, shape.hidden, generator=generator).to(dtype)
        index = torch.randperm(shape.experts, generator=generator)[None, : shape.top_k]
        weights = torch.rand(1, shape.top_k, generator=generator)
        tokens.append(Token(hidden, index, (weights / weights.sum()).to(dtype), shape))
    return tokens


def compute(token: Token, experts: Mapping[int, ExpertWeights]) -> Tensor:
    """The layer's output [1, H] with no more work than it takes: what a request is compared with."""
    total = torch.zeros(token.hidden.shape)
    for expert, weight in zip(token.index[0].tolist(), token.weights[0].tolist(), strict=True):
        total.add_(expert_ffn(token.hidden, experts[expert], SPEC), alpha=weight)
    return total.to(token.hidden.dtype)
