"""Weights in oneDNN's blocked layout, which its matrix products read nearly twice as fast as rows.

torch's product of bf16 matrices packs the weights anew at every call. Packed once, a product with few rows runs at the
memory's speed. Costs one copy when an expert is loaded, and no more memory than the plain weights. Results are within
the rounding of the plain product's, mostly but not always its very bits; the weights themselves are not rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from moehive.kernels.dequantize import dequantize
from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix

from .processor import this_processor

_SMALLEST: Final = 1 << 14  # elements: below, calling oneDNN costs more than it saves
_BLOCK: Final = 64  # rows and columns of a block of that layout at most: both are filled up to whole blocks
_PADDED: Final = 1 << 20  # elements: from here on, four equal rows are faster than one or two


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A bf16 matrix [N, K] (N outputs, K inputs) in oneDNN's layout."""

    blocked: Tensor  # opaque
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding included."""
        return packed_bytes(self.blocked)


@dataclass(frozen=True, slots=True, eq=False)
class PackedExpert:
    """One expert: gate_up [2I, H] and down [H, I], biases in bf16 or None. Too small matrices stay plain."""

    gate_up: PackedMatrix | WeightMatrix
    down: PackedMatrix | WeightMatrix
    gate_up_bias: Tensor | None = None  # [2I]
    down_bias: Tensor | None = None  # [H]

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        biases = sum(bias.nbytes for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return self.gate_up.nbytes + self.down.nbytes + biases


@lru_cache(maxsize=1)
def can_pack() -> bool:
    """Whether this machine and this build of torch have fast bf16 products over packed weights."""
    if not this_processor().has_fast_products(torch.bfloat16):
        return False
    try:
        product = pack(torch.eye(256, dtype=torch.bfloat16))
    except (AttributeError, RuntimeError):  # an operator that this build does not have
        return False
    rows = torch.arange(3 * 256).view(3, 256).remainder(251).bfloat16()
    return torch.equal(packed_product(rows, product, None), rows)


def pack(weight: Tensor) -> PackedMatrix:
    """A bf16 matrix [N, K] of any strides, copied into oneDNN's layout."""
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return PackedMatrix(blocked, (weight.shape[0], weight.shape[1]))


def unpack(matrix: PackedMatrix) -> Tensor:
    """The matrix [N, K] as it was before `pack`, value for value."""
    return matrix.blocked.to_dense()


def pack_expert(expert: ExpertMatrices) -> PackedExpert:
    """An expert of any format in bf16, packed where it pays. `can_pack` has to be true."""
    biases = (None if bias is None else bias.bfloat16() for bias in (expert.gate_up_bias, expert.down_bias))
    return PackedExpert(_packed(expert.gate_up), _packed(expert.down), *biases)


def packed_bytes(blocked: Tensor) -> int:
    """Bytes of an opaque tensor, padding included."""
    return int(torch.ops.mkldnn._nbytes(blocked))


def most_packed_bytes(rows: int, columns: int) -> int:
    """What a bf16 matrix [rows, columns] takes at most once `pack_weights` made it ready, padding included."""
    if rows * columns < _SMALLEST:
        return 2 * rows * columns
    return 2 * (-(-rows // _BLOCK) * _BLOCK) * (-(-columns // _BLOCK) * _BLOCK)


def pack_weights(weights: ExpertWeights) -> ExpertWeights:
    """bf16 weights, not transposed, whose matrices are in oneDNN's layout where that pays: opaque tensors.

    `plain_weights` has them as they were. Only `kernels.cpu.experts.expert_rows_fast` computes with them as they are.
    What stays plain beside a packed matrix is copied: as a view it would keep the plain form of all in memory.
    """
    matrices = weights.gate_up, weights.down
    if all(matrix.numel() < _SMALLEST for matrix in matrices):
        return weights
    gate_up, down = (matrix.clone() if matrix.numel() < _SMALLEST else pack(matrix).blocked for matrix in matrices)
    biases = (None if bias is None else bias.clone() for bias in (weights.gate_up_bias, weights.down_bias))
    return ExpertWeights(gate_up, down, *biases)


def plain_weights(weights: ExpertWeights) -> ExpertWeights:
    """What `pack_weights` was given, value for value; any others as they are."""
    if not is_packed(weights):
        return weights
    gate_up, down = (weight.to_dense() if weight.is_mkldnn else weight for weight in (weights.gate_up, weights.down))
    return ExpertWeights(gate_up, down, weights.gate_up_bias, weights.down_bias)


def is_packed(weights: ExpertWeights) -> bool:
    """Whether `pack_weights` made them."""
    return weights.gate_up.is_mkldnn or weights.down.is_mkldnn


def packed_expert(weights: ExpertWeights) -> PackedExpert:
    """What `pack_weights` made, as the products take it."""
    gate_up, down = (
        PackedMatrix(weight, (weight.shape[0], weight.shape[1]))
        if weight.is_mkldnn
        else WeightMatrix(WeightFormat.PLAIN, weight)
        for weight in (weights.gate_up, weights.down)
    )
    return PackedExpert(gate_up, down, weights.gate_up_bias, weights.down_bias)


def packed_product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
    """x @ matrix.T + bias: [R, N] for bf16 x [R, K]; sums are fp32, rounded once."""
    rows, size = x.shape[0], matrix.shape[0] * matrix.shape[1]
    # oneDNN's kernel for one row is slower than the one for four, and so is that for two.
    padded = size >= _PADDED and rows in (1, 2)
    if padded:
        x = x.repeat(4 // rows, 1)
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, matrix.blocked, bias, "none", [], "")
    return y[:rows] if padded else y


def _packed(matrix: WeightMatrix) -> PackedMatrix | WeightMatrix:
    rows, columns = matrix.shape
    weight = dequantize(matrix, torch.bfloat16)
    return pack(weight) if rows * columns >= _SMALLEST else WeightMatrix(WeightFormat.PLAIN, weight)
