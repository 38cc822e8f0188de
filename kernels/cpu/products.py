"""One matrix product, whatever the weights' format: as fast as torch can, and never widening a whole quantised matrix.

Few rows are bound by reading the weights, many by arithmetic. Which kernel is fastest for which was measured with
scripts/bench/cpu_experts.py.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.dequantize import dequantize, row_bands
from moehive.kernels.formats import WeightFormat, WeightMatrix

from .packed import PackedMatrix, packed_product
from .plain import plain_product
from .processor import this_processor

Matrix: TypeAlias = WeightMatrix | PackedMatrix

_BAND: Final = 1 << 20  # elements widened at a time: 4 MiB of fp32, which stay in the last-level cache
_INT8_ROWS: Final = 4  # up to which torch's product over int8 weights is faster than widening them
_INT8_STEP: Final = 32  # rows and columns it needs multiples of


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ matrix.T + bias, for x [R, K] and a contiguous out [R, N] of its dtype.

    Sums are fp32. Weights of another dtype or format are widened to x's or to fp32, each value rounded once at most.
    """
    if isinstance(matrix, PackedMatrix):
        out.copy_(packed_product(x, matrix, bias))
        return
    is_plain = matrix.format is WeightFormat.PLAIN and matrix.data.dtype == x.dtype
    product = plain_product(x, matrix.data) if is_plain else None
    if product is not None:
        product(x, matrix.data, out)
    elif _has_int8_kernel(x, matrix):
        _multiply_int8(x, matrix, out)
    else:
        _multiply_widened(x, matrix, out)
    if bias is not None:
        out.add_(bias)


def _multiply_widened(x: Tensor, matrix: WeightMatrix, out: Tensor) -> None:
    """Band by band, in x's dtype or, where the machine has no fast products of that, in fp32."""
    dtype = x.dtype if this_processor().has_fast_products(x.dtype) else torch.float32
    x = x.to(dtype)
    bands = list(row_bands(matrix, _BAND))
    height = bands[0][1] if bands else 0
    memory = torch.empty(height, matrix.shape[1], dtype=dtype)  # the same for all bands: it stays in the cache
    for start, stop in bands:
        band = dequantize(matrix.rows(start, stop), dtype, out=memory[: stop - start])  # [n, K]
        part = torch.empty(x.shape[0], stop - start, dtype=dtype)  # [R, n]
        product = plain_product(x, band)
        assert product is not None, f"products of {dtype} are fast"
        product(x, band, part)
        out[:, start:stop] = part


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
