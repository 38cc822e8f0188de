"""Experts that choose tokens instead of tokens that choose experts (Zhou et al. 2022, arXiv 2202.09368).

Every expert is equally loaded by construction. Whether a token is taken depends on all tokens of the batch, so this is
for training and for encoders; no decoder that emits one token at a time can use it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .router import best


class TokenChoice(NamedTuple):
    """What each of E experts took, C tokens each, earlier tokens first."""

    tokens: Tensor  # [E, C] int64, from the Triton kernel int32
    weights: Tensor  # [E, C] fp32: the softmax over the experts, of that token and expert


def choose_tokens(logits: Tensor, capacity: int) -> TokenChoice:
    """Each expert takes the `capacity` tokens that score highest for it of logits [T, E]; equal ones: the earlier.

    The Triton kernel on a GPU without gradients, torch everywhere else, differentiable in the weights. Raises
    ValueError for a capacity that is not in 1..T.
    """
    if logits.ndim != 2 or not 1 <= capacity <= logits.shape[0]:
        raise ValueError(f"experts cannot take {capacity} tokens each of logits {tuple(logits.shape)}, [T, E]")
    if logits.is_cuda and not (torch.is_grad_enabled() and logits.requires_grad):
        from .gpu.expert_choice import choose_tokens_on_gpu

        return choose_tokens_on_gpu(logits, capacity)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).t()  # [E, T]
    tokens = best(scores.detach(), capacity).sort(dim=-1).values  # [E, C]
    return TokenChoice(tokens, scores.gather(1, tokens))
