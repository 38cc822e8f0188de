"""From the rows of experts to one row per token on the GPU: fp32, in a fixed order, without atomics.

The order is that of kernels/combine.py, experts ascending, and within one expert by position: it depends on what was
chosen, not on the order in which a router named it or in which anybody was done.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .align import local_expert
from .rounding import rounded

_COLUMNS = 512  # of one program; two wide loads of bf16 for each lane of a warp, or four of fp32


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(outputs, experts, expert_map, weights, out, num_rows, H, E: tl.constexpr, TOP_K: tl.constexpr,
                   SPLITS: tl.constexpr, HAS_MAP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, K: tl.constexpr,
                   COLUMNS: tl.constexpr):  # fmt: skip
    """outputs [SPLITS, T * TOP_K, H], experts [T, TOP_K], weights [T, TOP_K] -> out [T, H].

    A program adds COLUMNS columns of one token. Rows of choices that were dropped, or whose expert is elsewhere, are
    not read: nobody wrote them.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    position = tl.arange(0, K)
    inside = position < TOP_K
    expert = tl.load(experts + token * TOP_K + position, mask=inside, other=E).to(tl.int32)
    here = local_expert(experts, expert_map, token * TOP_K + position, inside, E, HAS_MAP) >= 0
    order = tl.where(here, expert * K + position, E * K)  # unique; E * K: not here
    total = tl.zeros((COLUMNS,), tl.float32)
    for _ in tl.static_range(TOP_K):
        first = tl.min(order, 0)
        row = token * TOP_K + first % K
        mask = column < tl.where(first < E * K, H, 0)
        value = tl.zeros((COLUMNS,), tl.float32)
        for split in tl.static_range(SPLITS):
            at = outputs + (split * num_rows.to(tl.int64) + row) * H + column
            value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value = value * tl.load(weights + row, mask=first < E * K, other=0.0).to(tl.float32)
        total += value
        order = tl.where(order == first, E * K, order)
    total = rounded(total, out.dtype.element_ty).to(out.dtype.element_ty)
    tl.store(out + token * H + column, total, mask=column < H)


def combine(
    outputs: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of each token's rows, [T, H] of `dtype` (that of `outputs` by default): added in fp32 and rounded once.

    `outputs` is [T * K, H], or [S, T * K, H] where the inner dimension was split and partial sums are to be added
    first. `experts` [T, K] (int32 or int64) and `expert_map` are those that the rows were aligned with. `weights`
    [T, K] multiply the rows; None where that has been done. A token without any row gets zeros.
    """
    tokens, top_k = experts.shape
    splits = outputs.shape[0] if outputs.ndim == 3 else 1
    rows, hidden = outputs.shape[-2:]
    if rows != tokens * top_k:
        raise ValueError(f"{rows} rows are not {top_k} for each of {tokens} tokens")
    out = torch.empty(tokens, hidden, dtype=dtype or outputs.dtype, device=outputs.device)  # [T, H]
    if tokens:
        combine_kernel[(tokens, triton.cdiv(hidden, _COLUMNS))](
            outputs.contiguous(), experts.contiguous(), expert_map, None if weights is None else weights.contiguous(),
            out, rows, hidden, num_experts, top_k, splits, expert_map is not None, weights is not None,
            triton.next_power_of_2(top_k), _COLUMNS, num_warps=1,
        )  # fmt: skip
    return out
