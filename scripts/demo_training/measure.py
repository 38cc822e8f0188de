"""What a model is worth: held-out loss, routing, and a sample of its text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM, set_seed

from moehive.kernels.capacity import expert_capacity
from moehive.kernels.telemetry import load_balance_coefficient

from .model import Trainee
from .text import CONTEXT_LENGTH, Corpus

SAMPLE_PROMPT = "ROMEO:"
SAMPLE_TOKENS = 200
CAPACITY_FACTOR = 1.25  # of the experts that `Evaluation.over_capacity` imagines


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and routing statistics."""

    loss: float  # nats per token
    bits_per_character: float
    expert_shares: Tensor  # [L, E], every row sums to 1
    dropped: float  # what the layers report as dropped, over tokens and layers
    over_capacity: float  # share of the choices that experts with room for 1.25 times an even share would drop

    @property
    def balance(self) -> list[float]:
        """The load-balance coefficient of each layer."""
        return [load_balance_coefficient(share) for share in self.expert_shares]


@torch.no_grad()
def evaluate(trainee: Trainee, corpus: Corpus) -> Evaluation:
    """Measure loss and routing on the whole held-out text, in windows that do not overlap."""
    trainee.model.eval()
    ids = corpus.held_out_ids
    counts, dropped, over, nats = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0.0
    for start in range(0, len(ids) - 1, CONTEXT_LENGTH):
        window = ids[start : start + CONTEXT_LENGTH + 1]  # [T + 1]
        logits, reports = trainee.logits(window[None, :-1])  # [1, T, V]
        nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
        found = torch.stack([report.counts for report in reports])  # [L, E]
        counts = counts + found
        over = over + (found - _capacity(trainee, window.shape[0] - 1)).clamp(min=0).sum()
        dropped = dropped + torch.stack([report.dropped for report in reports]).sum()
    return Evaluation(
        loss=nats / (len(ids) - 1),
        bits_per_character=nats / math.log(2) / corpus.held_out_characters,
        expert_shares=counts / counts.sum(dim=-1, keepdim=True),
        dropped=float(dropped) / (len(trainee.layers) * (len(ids) - 1)),
        over_capacity=float(over / counts.sum()),
    )


def _capacity(trainee: Trainee, tokens: int) -> int:
    config = trainee.layers[0].config
    return expert_capacity(tokens, config.num_experts, config.top_k, CAPACITY_FACTOR)


def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Write a text from the sample prompt with the recommended settings."""
    set_seed(seed)
    inputs = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS)  # [1, T]
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))
