"""What a model is worth: held-out loss, routing, and a sample of its text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM, set_seed

from .text import CONTEXT_LENGTH, Corpus

SAMPLE_PROMPT = "ROMEO:"
SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and routing statistics."""

    loss: float  # nats per token
    bits_per_character: float
    expert_shares: Tensor  # [L, E], every row sums to 1


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, corpus: Corpus) -> Evaluation:
    """Measure loss and routing on the whole held-out text, in windows that do not overlap."""
    model.eval()
    ids = corpus.held_out_ids
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    picks = torch.zeros(model.config.num_hidden_layers, experts)  # [L, E]
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT_LENGTH):
        window = ids[start : start + CONTEXT_LENGTH + 1]  # [T + 1]
        output = model(input_ids=window[None, :-1], use_cache=False, output_router_logits=True)
        nats += F.cross_entropy(output.logits[0], window[1:], reduction="sum").item()  # logits [1, T, V]
        chosen = torch.stack(output.router_logits).topk(top_k, dim=-1).indices  # [L, T, K]
        picks += F.one_hot(chosen, experts).sum(dim=(1, 2))
    return Evaluation(
        loss=nats / (len(ids) - 1),
        bits_per_character=nats / math.log(2) / corpus.held_out_characters,
        expert_shares=picks / picks.sum(dim=-1, keepdim=True),
    )


def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Write a text from the sample prompt with the recommended settings."""
    set_seed(seed)
    inputs = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS)  # [1, T]
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))
