"""What the kernels are compared with: torch's grouped product, and a loop of dense products, both on bf16 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Call
from .shapes import Layer

Run = Callable[[Call], Tensor]


class DenseWeights:
    """Stacked bf16 weights of a layer: gate_up [E, 2I, H], down [E, H, I]. Values do not matter for time."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.gate_up = torch.randn(2 * layer.inner, layer.hidden, device=device).bfloat16().mul_(0.02)
        self.gate_up = self.gate_up.repeat(layer.experts, 1, 1)
        self.down = torch.randn(layer.hidden, layer.inner, device=device).bfloat16().mul_(0.02)
        self.down = self.down.repeat(layer.experts, 1, 1)


def _gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def loop_of_products(layer: Layer, weights: DenseWeights, calls: list[Call]) -> Run:
    """One expert after the other; which rows it has was found out before, so that only products are timed."""
    groups = {id(call): [torch.where(call.index == expert) for expert in range(layer.experts)] for call in calls}

    def run(call: Call) -> Tensor:
        out = torch.zeros_like(call.hidden)
        for expert, (token, position) in enumerate(groups[id(call)]):
            if token.numel():
                rows = F.linear(_gate(F.linear(call.hidden[token], weights.gate_up[expert])), weights.down[expert])
                out.index_add_(0, token, rows * call.weights[token, position, None].to(rows.dtype))
        return out

    return run


def grouped_product(layer: Layer, weights: DenseWeights) -> Run:
    """As transformers' `grouped_mm`: sort the rows, two grouped products, weigh, sum."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # a private name until torch 2.10

    def run(call: Call) -> Tensor:
        experts, order = torch.sort(call.index.reshape(-1), stable=True)
        counts = torch.histc(experts.float(), bins=layer.experts, min=0, max=layer.experts - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = call.hidden[order // layer.top_k]  # [T * k, H]
        inner = _gate(product(rows, weights.gate_up.transpose(1, 2), offs=ends))
        rows = product(inner, weights.down.transpose(1, 2), offs=ends)
        rows = rows * call.weights.reshape(-1)[order, None].to(rows.dtype)
        back = torch.empty_like(rows)
        back[order] = rows
        return back.view(*call.index.shape, -1).sum(1)

    return run
