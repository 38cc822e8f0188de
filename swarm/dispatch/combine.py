"""From the answers of several peers to the layer's output, in an order that does not depend on who answered first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moehive.kernels.combine import combine_rows
from moehive.kernels.routing import Assignment

from .request import LayerInput, Part


def combine_parts(call: LayerInput, parts: Sequence[Part]) -> Tensor:
    """The output [T, H] of one layer call, in the dtype of its hidden states."""
    if len(parts) == 1 and parts[0].tokens is None and call.form == "sum":
        return parts[0].output  # one peer answered for every token
    ordered = sorted(parts, key=lambda part: (part.assignments[0].expert, int(part.assignments[0].token[0])))
    return _add_rows(call, ordered) if call.form == "rows" else _add_sums(call, ordered)


def _add_sums(call: LayerInput, parts: Sequence[Part]) -> Tensor:
    """Partial sums added in fp32, rounded once."""
    total = torch.zeros(call.hidden.shape, dtype=torch.float32)  # [T, H]
    for part in parts:
        if part.tokens is None:
            total += part.output
        else:
            total.index_add_(0, part.tokens, part.output.float())
    return total.to(call.hidden.dtype)


def _add_rows(call: LayerInput, parts: Sequence[Part]) -> Tensor:
    """transformers' order of addition: equal to eager bit for bit, whoever computed which rows."""
    slices: dict[int, list[tuple[Assignment, Tensor]]] = {}
    for part in parts:
        counts = [assignment.token.shape[0] for assignment in part.assignments]
        for assignment, rows in zip(part.assignments, torch.split(part.output, counts), strict=True):
            slices.setdefault(assignment.expert, []).append((assignment, rows))
    outputs = ((expert, slices[expert]) for expert in sorted(slices))
    out = torch.zeros_like(call.hidden)  # [T, H]
    return combine_rows(out, (_join(expert, pieces) for expert, pieces in outputs), call.top_k_weights)


def _join(expert: int, pieces: Iterable[tuple[Assignment, Tensor]]) -> tuple[Assignment, Tensor]:
    """One expert's rows; several pieces only where it had more rows than fit into one request."""
    assignments, rows = zip(*pieces, strict=True)
    if len(rows) == 1:
        return assignments[0], rows[0]
    token = torch.cat([assignment.token for assignment in assignments])
    position = torch.cat([assignment.position for assignment in assignments])
    return Assignment(expert, token, position), torch.cat(rows)
