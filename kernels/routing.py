"""Which rows go to which expert.

Owns the order of the rows, which is eager's: experts ascending, within one expert by top-k position, then token. The
order matters because floating-point addition does not commute with it; combine.py adds in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

_FEW: Final = 64  # choices


class Assignment(NamedTuple):
    """The rows of one expert: row r is token `token[r]`, chosen as its `position[r]`-th of K."""

    expert: int
    token: Tensor  # [R] int64
    position: Tensor  # [R] int64


@dataclass(frozen=True, slots=True, eq=False)
class SortedRows:
    """The rows of all chosen experts behind each other, experts ascending; S in all."""

    experts: Sequence[int]  # that have a row
    counts: Sequence[int]  # rows of each
    token: Tensor  # [S] int64
    position: Tensor  # [S] int64

    def part(self, experts: slice, rows: slice) -> SortedRows:
        """Some of the experts, whose rows are `rows`."""
        return SortedRows(self.experts[experts], self.counts[experts], self.token[rows], self.position[rows])


def sort_rows(top_k_index: Tensor, num_experts: int) -> SortedRows:
    """Sort the choices `top_k_index` [T, K] by expert, ascending; experts without a row are absent.

    The index `num_experts` marks a choice that is to be left out (transformers' masked experts). Raises ValueError for
    any other index outside [0, num_experts).
    """
    tokens = top_k_index.shape[0]
    if top_k_index.numel() <= _FEW:
        return _sort_few(top_k_index.tolist(), num_experts)
    chosen, order = torch.sort(top_k_index.t().reshape(-1), stable=True)  # [K * T], by position, then token
    _check_range(int(chosen[0]), int(chosen[-1]), num_experts)
    # floor division and remainder: what eager gets from torch.where on each expert's [K, T] mask
    position = torch.div(order, tokens, rounding_mode="floor")  # [K * T]
    token = order - position * tokens  # [K * T]
    sizes = torch.bincount(chosen, minlength=num_experts).tolist()[:num_experts]
    used = [(expert, count) for expert, count in enumerate(sizes) if count]
    counts = [count for _, count in used]
    total = sum(counts)  # those that are to be left out come last
    return SortedRows([expert for expert, _ in used], counts, token[:total], position[:total])


def _sort_few(top_k_index: Sequence[Sequence[int]], num_experts: int) -> SortedRows:
    """`sort_rows` of so few choices that calling torch for each step would take longer."""
    chosen = sorted((e, position, token) for token, row in enumerate(top_k_index) for position, e in enumerate(row))
    if chosen:
        _check_range(chosen[0][0], chosen[-1][0], num_experts)
    counts: dict[int, int] = {}
    for expert, _, _ in chosen:
        counts[expert] = counts.get(expert, 0) + 1
    counts.pop(num_experts, None)
    del chosen[sum(counts.values()) :]
    token = torch.tensor(
        [token for _, _, token in chosen], dtype=torch.int64
    )  # of pairs it would take four times as long
    position = torch.tensor([position for _, position, _ in chosen], dtype=torch.int64)
    return SortedRows(list(counts), list(counts.values()), token, position)


def group_by_expert(top_k_index: Tensor, num_experts: int) -> list[Assignment]:
    """`sort_rows`, cut into one assignment for each expert."""
    if top_k_index.shape[0] == 1:
        order = order_of_token(top_k_index, num_experts)
        if len({expert for expert, _ in order}) == len(order):  # else an expert has several rows
            token, positions = _indices_of_token(top_k_index.shape[1])
            return [Assignment(expert, token, positions[position]) for expert, position in order]
    rows = sort_rows(top_k_index, num_experts)
    counts = list(rows.counts)
    tokens, positions = torch.split(rows.token, counts), torch.split(rows.position, counts)
    return [Assignment(*part) for part in zip(rows.experts, tokens, positions, strict=True)]


@lru_cache(maxsize=64)
def _indices_of_token(choices: int) -> tuple[Tensor, Sequence[Tensor]]:
    """Of one token's rows: its index [1], and each position [1]; shared by all calls, nobody writes to them."""
    with torch.inference_mode(False):  # others may need gradients of what they index
        return torch.zeros(1, dtype=torch.int64), torch.split(torch.arange(choices), 1)


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
