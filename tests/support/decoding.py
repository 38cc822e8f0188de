"""A whole matrix as the kernels' tiles decode it: tiles.py without a product behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moehive.kernels.formats import WeightFormat, WeightMatrix
from moehive.kernels.gpu.tiles import FP8_BLOCK, INT4_GROUP, INT8_CHANNEL, MXFP4, PLAIN, scale_tile, weight_tile

_FORMATS = dict(zip(WeightFormat, (PLAIN, FP8_BLOCK, INT8_CHANNEL, INT4_GROUP, MXFP4), strict=True))


@triton.jit
def decode_kernel(data, scale, zero, out, N, K, stride, stride_scale, FORMAT: tl.constexpr, HAS_ZERO: tl.constexpr,
                  ROWS: tl.constexpr, GROUP: tl.constexpr, HARDWARE_FP8: tl.constexpr, W: tl.constexpr,
                  BK: tl.constexpr, CT: tl.constexpr):  # fmt: skip
    """out [N, K], one tile a program."""
    n = tl.program_id(0) * W + tl.arange(0, W)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK)
    factor, offset = scale_tile(scale, zero, n, n < N, first, K, stride_scale, FORMAT, HAS_ZERO, ROWS, GROUP, BK)
    tile = weight_tile(data, factor, offset, n, n < N, first, K, stride, FORMAT, HAS_ZERO, False, GROUP, HARDWARE_FP8,
                       W, BK, False, CT)  # [BK, W]  # fmt: skip
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out + n[:, None] * K + k[None, :], tl.trans(tile), mask=inside)


def decode(matrix: WeightMatrix, dtype: torch.dtype, *, hardware_fp8: bool = True, inner: int = 64) -> Tensor:
    """[N, K] of `dtype`, in tiles of 64 rows and `inner` columns."""
    rows, columns = matrix.shape
    scale, data = matrix.scale, matrix.data
    if matrix.format is WeightFormat.FP8_BLOCK:
        data = data.view(torch.uint8)
    out = torch.empty(rows, columns, dtype=dtype, device=data.device)
    compute = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    decode_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, inner))](
        data, scale if scale is not None else data, matrix.zero if matrix.zero is not None else data, out,
        rows, columns, data.stride(0), 0 if scale is None or scale.ndim < 2 else scale.stride(0),
        _FORMATS[matrix.format].value, matrix.zero is not None, max(matrix.block[0], 1), max(matrix.block[1], 1),
        hardware_fp8, 64, inner, compute,
    )  # fmt: skip
    return out
