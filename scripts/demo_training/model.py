"""The network: its architecture, what it is trained to minimise, and how it is saved and read back."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .text import CONTEXT_LENGTH, END_OF_TEXT_ID, VOCABULARY_SIZE

BALANCE_COEFFICIENT = 0.01
INITIALIZER_RANGE = 0.06  # near 1 / sqrt(hidden size); with the usual 0.02 a model this small learns far more slowly


def model_config() -> Qwen3MoeConfig:
    """Return the architecture: 6 layers of 8 experts, of which every token uses 2."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=320,  # of a dense feed-forward layer, which this model has none of
        moe_intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        initializer_range=INITIALIZER_RANGE,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        output_router_logits=False,  # asked for by argument while training
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def generation_config() -> GenerationConfig:
    """Return the recommended sampling settings.

    There is no repetition penalty: it would also change greedy decoding, which then would no longer
    be the plain argmax of the logits.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=40,
        max_new_tokens=200,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def count_parameters(model: Qwen3MoeForCausalLM) -> tuple[int, int]:
    """Return how many parameters there are, and how many of them one token uses."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return total, total - idle


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Return the load-balancing loss of Switch Transformer, averaged over the layers.

    `router_logits` holds one `[N, E]` per layer. An even load gives `top_k`. The loss that
    transformers computes adds the layers up first, so that an expert starved in one layer and
    overloaded in another looks balanced; here every layer has to be balanced by itself.
    """
    probabilities = torch.stack(router_logits).softmax(dim=-1)  # [L, N, E]
    experts = probabilities.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices  # [L, N, K]
    load = F.one_hot(chosen, experts).sum(dim=2).float().mean(dim=1)  # [L, E], picks per token
    return experts * (load * probabilities.mean(dim=1)).sum(dim=-1).mean()


def training_loss(model: Qwen3MoeForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy plus load balancing for `inputs` and `targets`, both `[B, T]`."""
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())  # logits [B, T, V]
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
    return cross_entropy + BALANCE_COEFFICIENT * balance


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer into `folder`."""
    model.to(torch.bfloat16)
    model.generation_config = generation_config()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """Read a saved folder back the way its users do, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(Qwen3MoeForCausalLM, model), cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
