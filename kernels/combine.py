"""From the outputs of experts to one row per token.

Two forms. `combine_rows` adds weighted rows in eager's order and dtype: equal to transformers bit for bit.
`weighted_sum` is what a peer answers with when it may send one row per token: it accumulates in fp32, hence is close,
not equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from .routing import Assignment, SortedRows

_MANY: Final = 2048  # rows from which sorting them by token pays: 512 tokens of top-8, 17.7 -> 2.9 ms


def combine_rows(out: Tensor, outputs: Iterable[tuple[Assignment, Tensor]], top_k_weights: Tensor) -> Tensor:
    """Add experts' unweighted rows, each times its token's weight, to `out` [T, H] in place; returns `out`.

    `outputs` are (assignment, rows [R, H]) with experts ascending; `top_k_weights` is [T, K] and may be of a wider
    dtype than the rows (fp32 routers in bf16 models): the product is then made in that dtype and rounded once.
    """
    for assignment, rows in _ascending(outputs):
        weighted = rows * top_k_weights[assignment.token, assignment.position, None]  # [R, H]
        out.index_add_(0, assignment.token, weighted.to(out.dtype))
    return out


def add_sorted_rows(out: Tensor, rows: SortedRows, outputs: Tensor, top_k_weights: Tensor) -> None:
    """`combine_rows` for several experts at once, with their unweighted outputs [S, H] in the order of `rows`.

    Every expert is added alone: where one call adds several rows to a token, torch rounds only their sum.
    """
    sizes = list(rows.counts)
    weighted = (outputs * top_k_weights[rows.token, rows.position, None]).to(out.dtype)  # [S, H]
    for part, token in zip(torch.split(weighted, sizes), torch.split(rows.token, sizes), strict=True):
        out.index_add_(0, token, part)


def add_token_row(out: Tensor, row: Tensor, position: int, top_k_weights: Tensor) -> None:
    """`combine_rows` for one token and one expert: out, row [1, H], top_k_weights [1, K]."""
    out.add_((row * top_k_weights[:, position : position + 1]).to(out.dtype))


def weighted_sum(
    outputs: Iterable[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Sum of experts' rows times their weights: `shape` [T, H] of `dtype`, accumulated in fp32, rounded once.

    `outputs` are, for one expert after the other, (token [R] int64, rows [R, H], weights [R]). They are added in the
    order given. Tokens that no row belongs to get zeros.
    """
    total = torch.zeros(shape, dtype=torch.float32)  # [T, H]
    for token, rows, weights in outputs:
        add_weighted(total, token, rows, weights)
    return total.to(dtype)


def add_weighted(total: Tensor, token: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Add `rows` [R, H] times `weights` [R] to the fp32 rows `token` [R] int64 of `total` [T, H], in place."""
    total.index_add_(0, token, rows.float() * weights.float()[:, None])


def add_all_choices(total: Tensor, token: Tensor, rows: Tensor, weights: Tensor) -> None:
    """`add_weighted` where every one of the T tokens has R / T rows: the same bits, sooner if they are many.

    torch adds indexed rows one after the other in one thread; here each token's first rows are added, then its second.
    """
    tokens = total.shape[0]
    if rows.shape[0] < _MANY:
        add_weighted(total, token, rows, weights)
        return
    order = torch.sort(token, stable=True)[1].view(tokens, -1).t().contiguous()  # [R / T, T]: where a token's rows are
    weights = weights.float()
    for chosen in order:
        total.add_(rows.index_select(0, chosen).float().mul_(weights[chosen, None]))


def _ascending(outputs: Iterable[tuple[Assignment, Tensor]]) -> Iterable[tuple[Assignment, Tensor]]:
    last = -1
    for assignment, rows in outputs:
        assert assignment.expert > last, f"expert {assignment.expert} after expert {last}"
        last = assignment.expert
        yield assignment, rows
