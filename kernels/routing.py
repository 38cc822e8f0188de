"""Which rows go to which expert.

Owns the order of the rows, which is eager's: experts ascending, within one expert by top-k position, then token. The
order matters because floating-point addition does not commute with it; combine.py adds in this order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """The rows of one expert: row r is token `token[r]`, chosen as its `position[r]`-th of K."""

    expert: int
    token: Tensor  # [R] int64
    position: Tensor  # [R] int64


def group_by_expert(top_k_index: Tensor, num_experts: int) -> list[Assignment]:
    """Sort the choices `top_k_index` [T, K] by expert, ascending; experts without a row are absent.

    The index `num_experts` marks a choice that is to be left out (transformers' masked experts). Raises ValueError for
    any other index outside [0, num_experts).
    """
    tokens = top_k_index.shape[0]
    experts, order = torch.sort(top_k_index.t().reshape(-1), stable=True)  # [K * T], by position, then token
    if not experts.numel():
        return []
    _check_range(int(experts[0]), int(experts[-1]), num_experts)
    # floor division and remainder: what eager gets from torch.where on each expert's [K, T] mask
    position = torch.div(order, tokens, rounding_mode="floor")  # [K * T]
    token = order - position * tokens  # [K * T]
    groups, start = [], 0
    for expert, count in enumerate(torch.bincount(experts, minlength=num_experts).tolist()[:num_experts]):
        if count:
            groups.append(Assignment(expert, token[start : start + count], position[start : start + count]))
            start += count
    return groups


def order_of_token(top_k_index: Tensor, num_experts: int) -> list[tuple[int, int]]:
    """`group_by_expert` for one token [1, K], without index tensors: (expert, position) ascending.

    Decoding calls this once per layer. Raises ValueError as `group_by_expert` does.
    """
    chosen = sorted((expert, position) for position, expert in enumerate(top_k_index[0].tolist()))
    if chosen:
        _check_range(chosen[0][0], chosen[-1][0], num_experts)
    return [choice for choice in chosen if choice[0] != num_experts]


def _check_range(low: int, high: int, num_experts: int) -> None:
    if low < 0 or high > num_experts:
        raise ValueError(f"expert index {low if low < 0 else high} of a model with {num_experts} experts")
