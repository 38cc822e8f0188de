"""One matrix product, whatever the weights' format: as fast as torch can, and never widening a whole quantised matrix.

Few rows are bound by reading the weights, many by arithmetic. Which kernel is fastest for which was measured with
scripts/bench/cpu_experts.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from moehive.kernels.dequantize import dequantize, row_bands
from moehive.kernels.formats import WeightFormat, WeightMatrix

from .packed import PackedMatrix, packed_product

Matrix: TypeAlias = WeightMatrix | PackedMatrix

_BAND: Final = 1 << 20  # elements widened at a time: 4 MiB of fp32, which stay in the last-level cache
_ONEDNN_FP32: Final = 1 << 19  # elements from which oneDNN multiplies fp32 faster than MKL, for one row, too
_DOT_ROWS: Final = 5  # up to which half-precision dot products are faster than widening, where those are all there is
_EMULATED_ROWS: Final = 15  # the same where oneDNN computes bf16 with the instructions of fp32
_JIT_ROWS: Final = range(4, 7)  # for which oneDNN's linear layer beats torch's product where bf16 has no instructions
_MKL_ROWS: Final = 3  # up to which MKL multiplies fp32 faster than oneDNN with AVX-512
_INT8_ROWS: Final = 4  # up to which torch's product over int8 weights is faster than widening them
_INT8_STEP: Final = 32  # rows and columns it needs multiples of


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor) -> None:
    """out = x @ matrix.T + bias, for x [R, K] and a contiguous out [R, N] of its dtype.

    Sums are fp32. Weights of another dtype or format are widened to x's or to fp32, each value rounded once at most.
    """
    if isinstance(matrix, PackedMatrix):
        out.copy_(packed_product(x, matrix, bias))
        return
    if _has_int8_kernel(x, matrix):
        _multiply_int8(x, matrix, out)
    elif matrix.format is not WeightFormat.PLAIN or matrix.data.dtype != x.dtype or _is_slow(x):
        _multiply_widened(x, matrix, out)
    elif _uses_vector(x, matrix.data):
        torch.mv(matrix.data, x[0], out=out[0])  # at the memory's speed; torch's matrix product of one row is not
    elif _uses_onednn(x, matrix.data):
        out.copy_(_onednn(x, matrix.data))
    else:
        torch.mm(x, matrix.data.t(), out=out)
    if bias is not None:
        out.add_(bias)


def is_plain_fastest(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` would do nothing else than torch's own product of x [R, K] and a plain weight [N, K]."""
    return weight.dtype == x.dtype and not (_is_slow(x) or _uses_vector(x, weight) or _uses_onednn(x, weight))


def _multiply_widened(x: Tensor, matrix: WeightMatrix, out: Tensor) -> None:
    """Band by band, in x's dtype or, where the machine has no fast products of that, in fp32."""
    dtype = x.dtype if _is_fast(x.dtype) else torch.float32
    x = x.to(dtype)
    bands = list(row_bands(matrix, _BAND))
    height = bands[0][1] if bands else 0
    memory = torch.empty(height, matrix.shape[1], dtype=dtype)  # the same for all bands: it stays in the cache
    for start, stop in bands:
        band = dequantize(matrix.rows(start, stop), dtype, out=memory[: stop - start])  # [n, K]
        out[:, start:stop] = _onednn(x, band) if _uses_onednn(x, band) else F.linear(x, band)


def _uses_vector(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] == 1 and x.dtype == torch.bfloat16 and weight.is_contiguous() and _emulates_bf16()


def _uses_onednn(x: Tensor, weight: Tensor) -> bool:
    return _prefers_onednn(x.dtype, x.shape[0]) and weight.numel() >= _ONEDNN_FP32 and weight.is_contiguous()


@lru_cache(maxsize=256)
def _prefers_onednn(dtype: torch.dtype, rows: int) -> bool:
    """Of large matrices. Remembered, because a product of few rows takes no longer than a handful of questions."""
    if not _mkl_competes():
        return False
    if dtype == torch.bfloat16:
        return rows in _JIT_ROWS and _emulates_bf16()
    return dtype == torch.float32 and rows > (_MKL_ROWS if _has_avx512() else 0)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _is_slow(x: Tensor) -> bool:
    """Whether torch multiplies numbers of x's dtype slowly, dot by dot or emulated, and often enough to matter."""
    emulated = x.dtype == torch.bfloat16 and _emulates_bf16()
    return x.shape[0] > (_EMULATED_ROWS if emulated else _DOT_ROWS) and not _is_fast(x.dtype)


@lru_cache(maxsize=8)
def _is_fast(dtype: torch.dtype) -> bool:
    """Whether products of matrices of `dtype` are blocked: of bf16 and fp16 only with oneDNN, on newer processors."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported()) and not _emulates_bf16()
    return bool(ops._is_mkldnn_fp16_supported())


def _has_avx512() -> bool:
    return bool(torch.backends.cpu.get_cpu_capability() == "AVX512")


@lru_cache(maxsize=1)
def _emulates_bf16() -> bool:
    """Whether oneDNN computes bf16 with the instructions of fp32: AVX-512 without its bf16 extension."""
    return _has_avx512() and not torch.cpu._is_avx512_bf16_supported()


@lru_cache(maxsize=1)
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
