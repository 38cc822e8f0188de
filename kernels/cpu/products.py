"""One matrix product, whatever the weights' format: as fast as torch can, and never widening a whole quantised matrix.

Few rows are bound by reading the weights, many by arithmetic. Which kernel is fastest for which was measured with
scripts/bench/cpu_experts.py.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moehive.kernels.dequantize import dequantize, row_bands
from moehive.kernels.formats import WeightFormat, WeightMatrix

from .packed import PackedMatrix, packed_product

Matrix: TypeAlias = WeightMatrix | PackedMatrix

_BAND: Final = 1 << 18  # elements widened at a time: they stay in a core's second-level cache
_ONEDNN_FP32: Final = 1 << 20  # elements from which oneDNN multiplies fp32 faster than MKL, for two rows and more
_INT8_ROWS: Final = 4  # up to which torch's product over int8 weights is faster than widening them
_INT8_STEP: Final = 32  # rows and columns it needs multiples of


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ matrix.T + bias, for x [R, K] and a contiguous out [R, N] of its dtype.

    Sums are fp32. Weights of another dtype or format are widened to x's, each value rounded once.
    """
    if isinstance(matrix, PackedMatrix):
        out.copy_(packed_product(x, matrix, bias))
        return
    if matrix.format is WeightFormat.PLAIN and matrix.data.dtype == x.dtype:
        _multiply_plain(x, matrix.data, out)
    elif _has_int8_kernel(x, matrix):
        _multiply_int8(x, matrix, out)
    else:
        for start, stop in row_bands(matrix, _BAND):
            band = dequantize(matrix.rows(start, stop), x.dtype)  # [n, K]
            out[:, start:stop] = F.linear(x, band)
    if bias is not None:
        out.add_(bias)


def _multiply_plain(x: Tensor, weight: Tensor, out: Tensor) -> None:
    many = x.shape[0] > 1 and weight.numel() >= _ONEDNN_FP32
    if many and x.dtype == torch.float32 and weight.is_contiguous() and _mkl_competes():
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    else:
        torch.mm(x, weight.t(), out=out)


def _mkl_competes() -> bool:
    """Whether torch would use MKL for fp32 although oneDNN is there."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    return bool(mkl.is_available() and onednn.is_available())  # type: ignore[no-untyped-call]


def _has_int8_kernel(x: Tensor, matrix: WeightMatrix) -> bool:
    return (
        matrix.format is WeightFormat.INT8_CHANNEL
        and x.dtype == torch.bfloat16  # of the other dtypes torch's loop is not vectorised
        and x.shape[0] <= _INT8_ROWS
        and not any(side % _INT8_STEP for side in matrix.shape)
        and matrix.data.is_contiguous()
    )


def _multiply_int8(x: Tensor, matrix: WeightMatrix, out: Tensor) -> None:
    """The kernel would round the scales to bf16, so it gets ones, and its sums are scaled in fp32."""
    assert matrix.scale is not None
    ones = torch.ones(matrix.shape[0], dtype=x.dtype)
    sums = torch.ops.aten._weight_int8pack_mm(x.contiguous(), matrix.data, ones)  # [R, N]
    out.copy_(sums.float() * matrix.scale.float())
