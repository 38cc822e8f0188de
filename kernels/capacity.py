"""How many tokens an expert takes, and which come too late.

Owns the order of precedence: all first choices before any second choice, earlier tokens before later ones (GShard,
arXiv 2006.16668, algorithm 1; with one choice per token that of Switch Transformers, arXiv 2101.03961).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Choices that one expert takes of `tokens`: `factor` times an even share, rounded up, at least 1."""
    return max(math.ceil(factor * tokens * top_k / num_experts), 1)


def limit_to_capacity(experts: Tensor, capacity: int, num_experts: int, sequence_length: int | None = None) -> Tensor:
    """Which of the choices `experts` [T, K] find room: [T, K] bool.

    Each expert takes `capacity` choices of each sequence; `sequence_length` says how the T tokens are cut into
    sequences, None that they are one. An id of `num_experts` is a choice that was dropped before, and stays so.
    """
    tokens, top_k = experts.shape
    length = sequence_length or max(tokens, 1)
    order = experts.view(tokens // length, length, top_k).transpose(1, 2).flatten(1)  # [B, K * S], first choices first
    taken = torch.nn.functional.one_hot(order, num_experts + 1)  # [B, K * S, E + 1]
    position = taken.cumsum(dim=1).gather(2, order[..., None])[..., 0]  # [B, K * S], from 1
    kept = (position <= capacity) & (order < num_experts)
    return kept.view(tokens // length, top_k, length).transpose(1, 2).reshape(tokens, top_k)


def drop_late(
    weights: Tensor, experts: Tensor, capacity: int, num_experts: int, sequence_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """weights and experts, both [T, K], where choices that find no room have weight 0 and the id `num_experts`."""
    kept = limit_to_capacity(experts, capacity, num_experts, sequence_length)  # [T, K]
    return torch.where(kept, weights, 0.0), torch.where(kept, experts, num_experts)
