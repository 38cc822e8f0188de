"""Quantised weights to floating point: the exact value in fp32, rounded once.

The values are those that transformers computes for the formats that it knows. Works through a matrix in bands that
stay in the cache, with a few wide operations per band: torch converts 8-bit floats one at a time, and repeats scales
and looks up tables no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from .formats import E8M0_BIAS, INT4_ZERO, MXFP4_GROUP, WeightFormat, WeightMatrix

_BAND: Final = 1 << 20  # elements: 4 MiB of fp32, which stay in the last-level cache
_ROWS: Final = 64  # of which a band has a multiple, where it has as many: products are slower with ragged bands

# Small floats become fp16, whose conversion to fp32 is one instruction, subnormal numbers included. As int8 widened to
# int16, E4M3 has its sign in all upper bits, ssssssss seeeemmm; shifted by 7 and masked it is s0eeeemm m0000000, which
# lacks the difference of the biases, 15 - 7. E2M1 in the upper half of a byte, ssssssss seem0000, shifted by 5 is
# s000eem0 00000000 and lacks 15 - 1.
_E4M3_SHIFT: Final = 7
_E4M3_BITS: Final = 0xBF80 - (1 << 16)  # as int16
_E4M3_MISSING: Final = 2.0**8
_E4M3_NAN: Final = 0x7F  # without its sign
_E2M1_SHIFT: Final = 5
_E2M1_BITS: Final = 0x8E00 - (1 << 16)
_E2M1_MISSING: Final = 2.0**14


def dequantize(matrix: WeightMatrix, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The matrix [N, K] in floating point of `dtype`: each value computed in fp32 and rounded once.

    Plain weights are converted, and returned themselves where they are of `dtype` and no `out` is given. `out`
    [N, K] takes the result.
    """
    if matrix.format is WeightFormat.PLAIN:
        return matrix.data.to(dtype) if out is None else out.copy_(matrix.data)
    if out is None:
        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.data.device)
    bands = list(row_bands(matrix, _BAND))
    direct = out.dtype == torch.float32 and out.is_contiguous()
    memory = out if direct or not bands else out.new_empty(bands[0][1], matrix.shape[1], dtype=torch.float32)
    for start, stop in bands:  # in the same memory, which stays in the cache
        values = out[start:stop] if direct else memory[: stop - start]
        _fill(values, matrix.rows(start, stop))
        if not direct:
            out[start:stop].copy_(values)
    return out


def row_bands(matrix: WeightMatrix, elements: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into bands [start, stop) of whole blocks and about `elements` elements."""
    rows, columns = matrix.shape
    height = max(matrix.block[0], 1)
    step = max(elements // max(columns, 1) // height, 1) * height
    if height == 1 and step > _ROWS:
        step -= step % _ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _fill(values: Tensor, matrix: WeightMatrix) -> None:
    """A band, into contiguous fp32 values [n, K]."""
    data, scale = matrix.data, matrix.scale
    assert scale is not None
    if matrix.format is WeightFormat.FP8_BLOCK:
        _fill_e4m3(values, data)
        _by_blocks(Tensor.mul_, values, scale, matrix.block)
    elif matrix.format is WeightFormat.INT8_CHANNEL:
        values.copy_(data).mul_(scale.float()[:, None])
    elif matrix.format is WeightFormat.MXFP4:
        _fill_mxfp4(values, data, scale)
    else:
        values.copy_(_spread_nibbles(data, 0))
        if matrix.zero is None:
            values.sub_(INT4_ZERO)
        else:
            _by_blocks(Tensor.sub_, values, matrix.zero, matrix.block)
        _by_blocks(Tensor.mul_, values, scale, matrix.block)


def e4m3_values(data: Tensor) -> Tensor:
    """float8_e4m3fn to fp32, the same shape. Exact, NaN included."""
    values = torch.empty(data.shape, dtype=torch.float32, device=data.device)
    _fill_e4m3(values, data)
    return values


def _fill_e4m3(values: Tensor, data: Tensor) -> None:
    _fill_small_floats(values, data.view(torch.int8), _E4M3_SHIFT, _E4M3_BITS)
    values.mul_(_E4M3_MISSING)
    magnitudes = data.view(torch.uint8).bitwise_and(_E4M3_NAN)
    if data.numel() and int(magnitudes.max()) == _E4M3_NAN:  # asked in a way that torch is quick at
        values.masked_fill_(magnitudes == _E4M3_NAN, torch.nan)


def _fill_mxfp4(values: Tensor, data: Tensor, scale: Tensor) -> None:
    """From E2M1 [n, K / 2] and E8M0 [n, K / 32]: 255, too, is a power of two, as it is for transformers."""
    _fill_small_floats(values, _spread_nibbles(data, 4), _E2M1_SHIFT, _E2M1_BITS)
    values.mul_(2 * _E2M1_MISSING)  # and half the power: 2 ** 128 is no number
    halved = torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - (E8M0_BIAS + 1))  # [n, K / 32]
    _by_blocks(Tensor.mul_, values, halved, (1, MXFP4_GROUP))


def _fill_small_floats(values: Tensor, codes: Tensor, shift: int, bits: int) -> None:
    """fp32 from int8 codes, still to be multiplied by what their exponents lack."""
    halves = codes.to(torch.int16).bitwise_left_shift_(shift).bitwise_and_(bits)
    values.copy_(halves.view(torch.float16))


def _spread_nibbles(data: Tensor, shift: int) -> Tensor:
    """int8 [n, K] from bytes [n, K / 2], low half first: each half in a byte of its own, `shift` bits up.

    Two bytes are made as one int16, which is as they lie in the memory of a little-endian processor.
    """
    pairs = data.to(torch.int16, memory_format=torch.contiguous_format)
    high = pairs.bitwise_and(0xF0).bitwise_left_shift_(4 + shift)
    return pairs.bitwise_and_(0x0F).bitwise_left_shift_(shift).bitwise_or_(high).view(torch.int8)


def _by_blocks(act: Callable[[Tensor, Tensor], Tensor], values: Tensor, grid: Tensor, block: tuple[int, int]) -> None:
    """`act` in place on fp32 values [n, K] and the number of each one's block, from `grid` [n / height, K / width]."""
    (rows, columns), (height, width) = values.shape, block
    grid = grid.float()
    if rows % height or columns % width:  # the last blocks are cut
        act(values, grid.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns])
    else:
        act(values.view(rows // height, height, columns // width, width), grid[:, None, :, None])
