"""Random checkpoints with experts of real sizes, for benchmarks of moving them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig


def qwen3_shaped(
    directory: Path, *, layers: int, experts: int, top_k: int = 8, hidden: int = 2048, inner: int = 768
) -> Path:
    """Like Qwen3-30B-A3B, whose hidden size and experts are the defaults (9.4 MB in bf16), with a small vocabulary."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, num_experts=experts,
        num_experts_per_tok=top_k, norm_topk_prob=True, eos_token_id=None,
    )  # fmt: skip
    return _save(config, directory)


def mixtral_shaped(directory: Path, *, inner: int, experts: int) -> Path:
    """One layer of Mixtral's hidden size (4096) whose experts have `inner` features: 14336 in Mixtral-8x7B, 352 MB."""
    config = MixtralConfig(
        vocab_size=256, hidden_size=4096, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=1, num_local_experts=experts, num_experts_per_tok=2, eos_token_id=None,
    )  # fmt: skip
    return _save(config, directory)


def _save(config: Any, directory: Path) -> Path:
    config.initializer_range = 0.2  # spreads the routing
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def prompt(vocabulary: int, count: int) -> torch.Tensor:
    """A fixed prompt [1, count]."""
    return torch.randint(2, vocabulary, (1, count), generator=torch.Generator().manual_seed(count))
