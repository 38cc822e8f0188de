"""Experts and routings for measurements: sizes and bytes are real, values are random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.random_experts import random_matrix
from torch import Tensor

from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.gpu.table import ExpertTable

from .shapes import Layer


@dataclass(frozen=True, slots=True)
class Call:
    """One call's input: hidden [T, H] bf16, index [T, k], weights [T, k] fp32."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def active(self) -> int:
        """Experts that are hit."""
        return int(self.index.unique().numel())

    def padded_rows(self, block: int) -> int:
        """Rows when each expert's are rounded up to whole blocks."""
        counts = torch.bincount(self.index.reshape(-1))
        return int(((counts + block - 1) // block * block).sum())


def fill_table(layer: Layer, device: torch.device, generator: torch.Generator) -> ExpertTable:
    """All experts of the layer, each in memory of its own; one is random, the others are copies of it."""
    gate_up, _ = random_matrix(layer.kind, 2 * layer.inner, layer.hidden, generator, Tensor.contiguous)
    down, _ = random_matrix(layer.kind, layer.hidden, layer.inner, generator, Tensor.contiguous)
    biases = (None, None)
    if layer.spec.gate != "concatenated":
        biases = tuple(torch.zeros(n, dtype=torch.bfloat16, device=device) for n in (2 * layer.inner, layer.hidden))
    first = ExpertMatrices(gate_up, down, *biases)
    return ExpertTable.of([first, *(_copy(first) for _ in range(layer.experts - 1))], device)


def _copy(expert: ExpertMatrices) -> ExpertMatrices:
    matrices = []
    for matrix in (expert.gate_up, expert.down):
        parts = [None if part is None else part.clone() for part in (matrix.data, matrix.scale, matrix.zero)]
        matrices.append(type(matrix)(matrix.format, *parts, block=matrix.block))
    biases = (None if bias is None else bias.clone() for bias in (expert.gate_up_bias, expert.down_bias))
    return ExpertMatrices(*matrices, *biases)


def make_calls(layer: Layer, tokens: int, count: int, generator: torch.Generator) -> list[Call]:
    """Calls whose experts are not still in the L2 cache from the call before.

    As long as a call has no more choices than there are experts, the calls deal all experts out before any comes again;
    with more choices nearly all experts are hit by each call, and those are far more bytes than the cache holds.
    """
    device = generator.device
    deck = torch.empty(0, dtype=torch.int64, device=device)
    calls = []
    for _ in range(count):
        rows = tokens * layer.top_k
        if rows <= layer.experts:
            if deck.numel() < rows:
                deck = torch.randperm(layer.experts, generator=generator, device=device)
            index, deck = deck[:rows].view(tokens, layer.top_k), deck[rows:]
        else:
            scores = torch.rand(tokens, layer.experts, generator=generator, device=device)
            index = scores.topk(layer.top_k).indices
        hidden = torch.randn(tokens, layer.hidden, generator=generator, device=device).bfloat16()
        weights = torch.rand(tokens, layer.top_k, generator=generator, device=device)
        calls.append(Call(hidden, index.contiguous(), weights))
    return calls
