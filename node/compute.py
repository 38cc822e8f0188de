"""The mathematics of a batch of requests for one layer: each expert's weights are used once for all of them.

`sum` requests are merged: one matrix product per expert over everybody's rows. `rows` requests are computed one by one,
because their callers rely on the product over just their rows (transformers' bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.protocol.messages import RunExperts
from moehive.swarm.dispatch.request import DTYPES, parse_request

# (layer, expert, dtype) -> the weights, held while the context lasts
LeaseExpert = Callable[[int, int, torch.dtype], AbstractContextManager[ExpertWeights]]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One request, as tensors."""

    message: RunExperts
    hidden: Tensor  # [T, H]
    token: Tensor  # [R] int64: rows of the experts in the order of the message
    weights: Tensor | None  # [R], sum form

    @classmethod
    def parse(cls, message: RunExperts, payload: bytearray) -> Work:
        """Read a payload that `message.check` accepted. Raises ValueError for an index outside it."""
        hidden, token, weights = parse_request(message, payload)
        return cls(message, hidden, token, weights)

    @property
    def merges(self) -> bool:
        """Whether the request may be computed together with others."""
        return self.message.form == "sum"


def run_batch(batch: Sequence[Work], lease: LeaseExpert, spec: FfnSpec) -> list[Tensor]:
    """The answers to requests of one layer and dtype, in the order of `batch`. Raises what `lease` raises."""
    merged = [work for work in batch if work.merges]
    sums = dict(zip(map(id, merged), _run_merged(merged, lease, spec), strict=True)) if merged else {}
    return [sums[id(work)] if work.merges else _run_rows(work, lease, spec) for work in batch]


def _run_rows(work: Work, lease: LeaseExpert, spec: FfnSpec) -> Tensor:
    """Unweighted expert outputs [R, H]."""
    message, dtype = work.message, work.hidden.dtype
    out = torch.empty(message.rows, message.hidden, dtype=dtype)  # [R, H]
    start = 0
    for expert, count in zip(message.experts, message.counts, strict=True):
        token = work.token[start : start + count]
        with lease(message.layer, expert, dtype) as weights:
            out[start : start + count] = expert_ffn(work.hidden[token], weights, spec)
        start += count
    return out


def _run_merged(batch: Sequence[Work], lease: LeaseExpert, spec: FfnSpec) -> list[Tensor]:
    """Weighted sums, [T, H] of each request: accumulated in fp32 in ascending expert order, rounded once."""
    layer, dtype = batch[0].message.layer, DTYPES[batch[0].message.dtype]
    hidden = batch[0].hidden if len(batch) == 1 else torch.cat([work.hidden for work in batch])  # [sum T, H]
    total = torch.zeros(hidden.shape, dtype=torch.float32)  # [sum T, H]
    for expert, (token, row_weights) in sorted(_rows_by_expert(batch).items()):
        with lease(layer, expert, dtype) as weights:
            rows = expert_ffn(hidden[token], weights, spec)  # [R, H]
        total.index_add_(0, token, rows.float() * row_weights[:, None])
    return list(torch.split(total.to(dtype), [work.message.tokens for work in batch]))


def _rows_by_expert(batch: Sequence[Work]) -> dict[int, tuple[Tensor, Tensor]]:
    """Per expert: token indices [R] into the merged batch, and fp32 weights [R]."""
    pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}
    offset = 0
    for work in batch:
        assert work.weights is not None
        row_weights = work.weights.float()
        start = 0
        for expert, count in zip(work.message.experts, work.message.counts, strict=True):
            part = slice(start, start + count)
            pieces.setdefault(expert, []).append((work.token[part] + offset, row_weights[part]))
            start += count
        offset += work.message.tokens
    return {expert: _cat(found) for expert, found in pieces.items()}


def _cat(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pieces) == 1:
        return pieces[0]
    tokens, weights = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(weights)
