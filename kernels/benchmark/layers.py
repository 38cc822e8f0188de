"""Experts and calls for measurements: sizes and bytes are real, values are random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import CLAMPED_INTERLEAVED
from moehive.kernels.formats import E8M0_BIAS, ExpertMatrices, WeightFormat, WeightMatrix

from .shapes import LayerShape, Stored

_E4M3_FINITE: Final = 0x7F  # codes without their sign; this one is not a number
_NIBBLE_SPREAD: Final = 5.0  # standard deviation of uniform codes


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call's input: hidden [T, H], index [T, k] int64, weights [T, k] fp32."""

    hidden: Tensor
    index: Tensor
    weights: Tensor

    @property
    def active(self) -> int:
        """Experts that are hit."""
        return int((torch.bincount(self.index.reshape(-1)) > 0).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The experts of a layer, of which `held` have memory of their own; the others stand for them in turn."""

    every: Sequence[ExpertMatrices]
    held: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(expert.nbytes for expert in self.every[: self.held])


def make_experts(shape: LayerShape, device: torch.device, budget: float) -> Experts:
    """All experts of the layer, or as many as `budget` bytes take, at least as many as one token uses."""
    held = min(shape.experts, max(int(budget // shape.expert_bytes), shape.top_k))
    generator = torch.Generator(device).manual_seed(0)
    gate_up = random_matrix(shape.stored, 2 * shape.inner, shape.hidden, generator)
    down = random_matrix(shape.stored, shape.hidden, shape.inner, generator)
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if shape.spec.gate == CLAMPED_INTERLEAVED:
        dtype = shape.stored.dtype
        biases = tuple(torch.zeros(n, dtype=dtype, device=device) for n in (2 * shape.inner, shape.hidden))  # type: ignore[assignment]
    first = ExpertMatrices(gate_up, down, *biases)
    own = [first, *(_copy(first) for _ in range(held - 1))]
    return Experts([own[number % held] for number in range(shape.experts)], held)


def random_matrix(stored: Stored, rows: int, columns: int, generator: torch.Generator) -> WeightMatrix:
    """A matrix [rows, columns] of about the standard deviation 1 / sqrt(columns)."""
    size, device = columns**-0.5, generator.device
    if stored.format is WeightFormat.PLAIN:
        data = torch.randn(rows, columns, generator=generator, device=device).mul_(size).to(stored.dtype)
        return WeightMatrix(WeightFormat.PLAIN, data)
    if stored.format is WeightFormat.INT8_CHANNEL:
        data = _codes((rows, columns), 256, generator).view(torch.int8)
        scale = torch.full((rows,), size / 73, dtype=stored.dtype, device=device)
        return WeightMatrix(stored.format, data, scale, block=(1, columns))
    if stored.format is WeightFormat.FP8_BLOCK:
        data = _codes((rows, columns), _E4M3_FINITE, generator).view(torch.float8_e4m3fn)
        grid = (-(-rows // stored.group), -(-columns // stored.group))
        scale = torch.full(grid, size / 100, device=device)
        return WeightMatrix(stored.format, data, scale, block=(stored.group, stored.group))
    data, grid = _codes((rows, columns // 2), 256, generator), (rows, -(-columns // stored.group))
    if stored.format is WeightFormat.MXFP4:
        exponent = E8M0_BIAS + round(torch.tensor(size / 3).log2().item())
        return WeightMatrix(
            stored.format, data, torch.full(grid, exponent, dtype=torch.uint8, device=device), block=(1, stored.group)
        )
    scale = torch.full(grid, size / _NIBBLE_SPREAD, dtype=stored.dtype, device=device)
    return WeightMatrix(stored.format, data, scale, block=(1, stored.group))


def _codes(shape: tuple[int, int], below: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=generator, device=generator.device)


def _copy(expert: ExpertMatrices) -> ExpertMatrices:
    gate_up, down = (
        WeightMatrix(m.format, m.data.clone(), None if m.scale is None else m.scale.clone(), block=m.block)
        for m in (expert.gate_up, expert.down)
    )
    return ExpertMatrices(gate_up, down, expert.gate_up_bias, expert.down_bias)


def make_calls(
    shape: LayerShape, tokens: int, count: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[Call]:
    """Calls with random experts: different ones in each, so that what one reads is not left in a cache by the last."""
    generator = torch.Generator(device).manual_seed(1)
    calls = []
    for _ in range(count):
        scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
        weights, index = scores.topk(shape.top_k)
        hidden = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
        calls.append(Call(hidden, index, weights / weights.sum(1, keepdim=True)))
    return calls
