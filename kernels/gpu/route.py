"""Routing on the GPU: one kernel for every way in which a family chooses experts, and one for capacities.

`route_kernel` is `kernels/router.py` again, one warp for a few tokens. Scores, choices and weights stay in registers.
What decides a choice is compared as integers, because a GPU's maximum passes over NaN: so NaN is the greatest here as
it is in torch, its weight is NaN, and ids are always those of different experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moehive.kernels.router import GroupScore, RouterSpec, Routing, Score

from .rounding import rounded

SOFTMAX = tl.constexpr(0)
TOP_K_SOFTMAX = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
SPARSEMIXER = tl.constexpr(3)
NEVER = tl.constexpr(float("-inf"))
TAKEN = tl.constexpr(-(2**31))  # below the order of every number
NAN = tl.constexpr(0x7FC00000)  # above that of infinity

_SCORES = {
    Score.SOFTMAX: SOFTMAX.value,
    Score.TOP_K_SOFTMAX: TOP_K_SOFTMAX.value,
    Score.SIGMOID: SIGMOID.value,
    Score.SPARSEMIXER: SPARSEMIXER.value,
}
_LANES = 128  # experts, with padding, times tokens of one program: four for each lane of its warp
_MOST_TOKENS = 16
_CAPACITY_TOKENS, _CAPACITY_EXPERTS = 64, 32  # tile of one step of the capacity kernel


@triton.jit
def order_of(value):
    """fp32 values as int32 in the same order; NaN is greatest, both zeros are equal, and none is TAKEN."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def value_of(order):
    """The fp32 values of an order; TAKEN is NaN."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def take_best(order, column, COLUMNS: tl.constexpr):
    """Of each row of order [R, C] the greatest element: (it [R, 1], its column [R, 1]), ties to the lowest."""
    greatest = tl.max(order, 1)[:, None]
    return greatest, tl.min(tl.where(order == greatest, column, COLUMNS), 1)[:, None]


@triton.jit
def keep_best_groups(order, R: tl.constexpr, G: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
                     TOP_GROUPS: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """order [R, G * S] where all but the best groups are TAKEN. G, S: number and size of groups, padded to powers of
    two; padding is TAKEN before."""
    grouped = tl.reshape(order, (R, G, S))
    worth = tl.max(grouped, 2)  # [R, G]
    if SUM:
        member = tl.arange(0, S)[None, None, :]
        first = tl.min(tl.where(grouped == worth[:, :, None], member, S), 2)
        second = tl.max(tl.where(member == first[:, :, None], TAKEN, grouped), 2)
        worth = order_of(value_of(worth) + value_of(second))
    group = tl.arange(0, G)[None, :]
    worth = tl.where(group < GROUPS, worth, TAKEN)
    chosen = tl.zeros((R, G), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        _, at = take_best(worth, group, G)
        chosen = tl.where(group == at, 1, chosen)
        worth = tl.where(group == at, TAKEN, worth)
    wide = tl.reshape(tl.broadcast_to(chosen[:, :, None], (R, G, S)), (R, G * S))
    return tl.where(wide == 1, order, TAKEN)


@triton.jit
def sparsemixer_weight(logit, order, top, at, column, THRESHOLD: tl.constexpr, ROUND_TO: tl.constexpr):
    """The weight [R, 1] of the logit `top` at column `at`: softmax over those that are not taken and come near it."""
    distance = rounded(top - logit, ROUND_TO)
    far = rounded(tl.div_rn(distance, tl.maximum(tl.abs(logit), top)), ROUND_TO) > THRESHOLD
    share = tl.where((order != TAKEN) & (far == 0), tl.exp(logit - top), 0.0)
    return tl.sum(tl.where(column == at, share, 0.0), 1)[:, None] / tl.sum(share, 1)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(logits, bias, weights, experts, tokens, stride,
                 E: tl.constexpr, TOP_K: tl.constexpr, SCORE: tl.constexpr, BY_LOGITS: tl.constexpr,
                 HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SUM: tl.constexpr,
                 NORMALIZE: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr,
                 THRESHOLD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """logits [T, E] with rows `stride` apart -> weights [T, TOP_K], experts [T, TOP_K] int32; bias [E] or None.

    Experts stand in G * S columns: G >= GROUPS groups, S >= E / GROUPS places each, both powers of two, so that the
    padding of a group never counts for its neighbour. K is TOP_K's power of two. A program takes BLOCK tokens.
    """
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]  # [BLOCK, 1]
    column = tl.arange(0, G * S)[None, :]  # [1, G * S]
    expert = column // S * (E // GROUPS) + column % S
    exists = (column // S < GROUPS) & (column % S < E // GROUPS)
    logit = tl.load(logits + token * stride + expert, mask=(token < tokens) & exists, other=0.0).to(tl.float32)
    logit = tl.where(exists, logit, NEVER)
    score = logit
    if SCORE == SOFTMAX:
        score = tl.exp(logit - tl.max(logit, 1)[:, None])
        score = score / tl.sum(score, 1)[:, None]
    elif SCORE == SIGMOID:
        score = tl.sigmoid(logit)
    key = logit if BY_LOGITS else score
    if HAS_BIAS:
        key += tl.load(bias + expert, mask=exists, other=0.0)
    order = tl.where(exists, order_of(key), TAKEN)
    if TOP_GROUPS < GROUPS:
        order = keep_best_groups(order, BLOCK, G, S, GROUPS, TOP_GROUPS, GROUP_SUM)
    place = tl.arange(0, K)[None, :]  # [1, K]
    weight = tl.zeros((BLOCK, K), tl.float32)
    chosen = tl.zeros((BLOCK, K), tl.int32)
    for j in tl.static_range(TOP_K):
        top, at = take_best(order, column, G * S)
        if SCORE == SPARSEMIXER:
            one = sparsemixer_weight(logit, order, value_of(top), at, column, THRESHOLD, logits.dtype.element_ty)
        else:
            one = tl.sum(tl.where(column == at, score, 0.0), 1)[:, None]
        weight = tl.where(place == j, one, weight)
        chosen = tl.where(place == j, at // S * (E // GROUPS) + at % S, chosen)
        order = tl.where(column == at, TAKEN, order)
    if SCORE == TOP_K_SOFTMAX:
        weight = tl.where(place < TOP_K, weight, NEVER)
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    if NORMALIZE:
        total = tl.sum(weight, 1)[:, None]
        weight = weight / (tl.where(total < FLOOR, FLOOR, total) + EPS)  # a maximum would pass over NaN
    weight = rounded(weight * SCALE, weights.dtype.element_ty).to(weights.dtype.element_ty)
    inside = (token < tokens) & (place < TOP_K)
    tl.store(weights + token * TOP_K + place, weight, mask=inside)
    tl.store(experts + token * TOP_K + place, chosen, mask=inside)


@triton.jit(do_not_specialize=["length", "capacity"])
def capacity_kernel(weights, experts, length, capacity, E: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
                    EXPERTS: tl.constexpr):  # fmt: skip
    """Choices beyond `capacity` of an expert and sequence become expert E with weight 0, in place.

    A program counts EXPERTS experts in one sequence of `length` tokens; it changes the choices of those only.
    """
    start = tl.program_id(0).to(tl.int64) * length
    mine = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)[None, :]  # [1, EXPERTS]
    taken = tl.zeros((1, EXPERTS), tl.int32)
    for j in tl.static_range(TOP_K):
        for first in range(0, length, TOKENS):
            token = first + tl.arange(0, TOKENS)
            at = (start + token) * TOP_K + j
            chosen = tl.load(experts + at, mask=token < length, other=E)
            hit = ((chosen[:, None] == mine) & (mine < E)).to(tl.int32)  # [TOKENS, EXPERTS]
            position = tl.sum((tl.cumsum(hit, 0) + taken) * hit, 1)  # [TOKENS] from 1; 0 for experts of others
            late = position > capacity
            tl.store(experts + at, tl.full((TOKENS,), E, tl.int32), mask=late)
            tl.store(weights + at, tl.zeros((TOKENS,), weights.dtype.element_ty), mask=late)
            taken += tl.sum(hit, 0)[None, :]


def route_on_gpu(
    logits: Tensor,
    spec: RouterSpec,
    correction_bias: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """`kernels.router.route` by Triton; arguments have been checked there. Experts come as int32."""
    tokens = logits.shape[0]
    dtype = (hidden_dtype or logits.dtype) if spec.weights_in_hidden_dtype else torch.float32
    weights = torch.empty(tokens, spec.top_k, dtype=dtype, device=logits.device)  # [T, K]
    experts = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=logits.device)  # [T, K]
    if tokens:
        launch_route(logits, spec, correction_bias, weights, experts)
        if spec.capacity is not None:
            launch_capacity(weights, experts, spec.capacity, spec.num_experts, sequence_length)
    return Routing(weights, experts)


def launch_route(
    logits: Tensor, spec: RouterSpec, correction_bias: Tensor | None, weights: Tensor, experts: Tensor
) -> None:
    """Fill weights [T, K] and experts [T, K] int32, both contiguous. T must not be 0."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    constants = route_constants(spec, logits.dtype)
    grid = (triton.cdiv(logits.shape[0], constants["BLOCK"]),)
    route_kernel[grid](
        logits, correction_bias, weights, experts, logits.shape[0], logits.stride(0), **constants, num_warps=1
    )


def route_constants(spec: RouterSpec, dtype: torch.dtype) -> dict[str, int | float | bool]:
    """The constexpr arguments of `route_kernel` for logits of `dtype`."""
    groups = spec.groups if spec.is_grouped else 1
    padded_groups, padded_size = (triton.next_power_of_2(size) for size in (groups, spec.num_experts // groups))
    return {
        "E": spec.num_experts,
        "TOP_K": spec.top_k,
        "SCORE": _SCORES[spec.score],
        "BY_LOGITS": spec.chooses_by_logits,
        "HAS_BIAS": spec.correction_bias,
        "GROUPS": groups,
        "TOP_GROUPS": spec.top_groups if groups > 1 else 1,
        "GROUP_SUM": spec.group_score is GroupScore.TOP_2_SUM,
        "NORMALIZE": spec.normalize,
        "EPS": spec.eps,
        "FLOOR": spec.floor,
        "SCALE": spec.scale,
        "THRESHOLD": torch.tensor(2 * spec.nearness, dtype=dtype).item(),  # compared in the logits' dtype
        "G": padded_groups,
        "S": padded_size,
        "K": triton.next_power_of_2(spec.top_k),
        "BLOCK": min(max(_LANES // (padded_groups * padded_size), 1), _MOST_TOKENS),
    }


def launch_capacity(
    weights: Tensor, experts: Tensor, capacity: int, num_experts: int, sequence_length: int | None
) -> None:
    """Drop choices beyond `capacity` from weights [T, K] and experts [T, K] int32, in place."""
    tokens, top_k = experts.shape
    length = tokens if sequence_length is None else sequence_length
    grid = (tokens // length, triton.cdiv(num_experts, _CAPACITY_EXPERTS))
    capacity_kernel[grid](
        weights, experts, length, capacity, num_experts, top_k, _CAPACITY_TOKENS, _CAPACITY_EXPERTS, num_warps=4
    )
