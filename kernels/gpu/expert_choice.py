"""Expert choice on the GPU: softmax over experts, then for each expert the best tokens, without sorting.

The least score that is still taken is found bit by bit, from the highest: scores are not negative, so their bits order
as they do. One more pass writes the tokens in their order, so nothing depends on which program was first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moehive.kernels.expert_choice import TokenChoice

_TOKENS = 4096  # of one step of the selection, at most


@triton.jit(do_not_specialize=["tokens"])
def softmax_by_expert_kernel(logits, scores, tokens, stride, E: tl.constexpr, EP: tl.constexpr,
                             BLOCK: tl.constexpr):  # fmt: skip
    """logits [T, E] with rows `stride` apart -> scores [E, T] fp32, which sum to 1 over the experts."""
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]  # [BLOCK, 1]
    expert = tl.arange(0, EP)[None, :]
    mask = (token < tokens) & (expert < E)
    logit = tl.load(logits + token * stride + expert, mask=mask, other=0.0).to(tl.float32)
    logit = tl.where(tl.broadcast_to(expert < E, (BLOCK, EP)), logit, float("-inf"))
    score = tl.exp(logit - tl.max(logit, 1)[:, None])
    score = score / tl.sum(score, 1)[:, None]
    tl.store(scores + expert.to(tl.int64) * tokens + token, score, mask=mask)


@triton.jit
def ordered_bits(scores, token, tokens):
    """Scores as integers in the same order; -1 beyond the last token. NaN is greatest."""
    bits = tl.load(scores + token, mask=token < tokens, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(token < tokens, bits, -1)


@triton.jit(do_not_specialize=["tokens", "capacity"])
def choose_kernel(scores, chosen, weights, tokens, capacity, TOKENS: tl.constexpr):
    """scores [E, T] -> the `capacity` best tokens of each expert, ascending: chosen, weights [E, capacity]."""
    expert = tl.program_id(0).to(tl.int64)
    scores += expert * tokens
    least = 0
    taken = 0
    for bit in range(31):
        candidate = least | (1 << (30 - bit))
        count = 0
        for first in range(0, tokens, TOKENS):
            bits = ordered_bits(scores, first + tl.arange(0, TOKENS), tokens)
            count += tl.sum((bits >= candidate).to(tl.int32), 0)
        least = tl.where(count >= capacity, candidate, least)
    for first in range(0, tokens, TOKENS):
        bits = ordered_bits(scores, first + tl.arange(0, TOKENS), tokens)
        taken += tl.sum((bits > least).to(tl.int32), 0)
    room = capacity - taken  # for tokens that score the least; the first of them
    place = 0
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        bits = ordered_bits(scores, token, tokens)
        equal = (bits == least).to(tl.int32)
        take = (bits > least) | ((equal == 1) & (tl.cumsum(equal, 0) <= room))
        room -= tl.sum(equal, 0)
        at = expert * capacity + place + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(chosen + at, token, mask=take)
        tl.store(weights + at, tl.load(scores + token, mask=take, other=0.0), mask=take)
        place += tl.sum(take.to(tl.int32), 0)


def choose_tokens_on_gpu(logits: Tensor, capacity: int) -> TokenChoice:
    """`kernels.expert_choice.choose_tokens` by Triton; arguments have been checked there. Tokens come as int32."""
    tokens, num_experts = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    scores = torch.empty(num_experts, tokens, dtype=torch.float32, device=logits.device)  # [E, T]
    chosen = torch.empty(num_experts, capacity, dtype=torch.int32, device=logits.device)  # [E, C]
    weights = torch.empty(num_experts, capacity, dtype=torch.float32, device=logits.device)  # [E, C]
    padded = triton.next_power_of_2(num_experts)
    block = max(2048 // padded, 1)
    softmax_by_expert_kernel[(triton.cdiv(tokens, block),)](
        logits, scores, tokens, logits.stride(0), num_experts, padded, block, num_warps=4
    )
    step = min(triton.next_power_of_2(tokens), _TOKENS)
    choose_kernel[(num_experts,)](scores, chosen, weights, tokens, capacity, step, num_warps=8)
    return TokenChoice(chosen, weights)
