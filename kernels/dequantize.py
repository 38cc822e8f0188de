"""Quantised weights to floating point: the exact value in fp32, rounded once.

The values are those that transformers computes for the formats that it knows. Works through a matrix in bands that
stay in a core's cache, with a few wide integer operations per band: torch converts an 8-bit float one at a time, which
is eight times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from .formats import E2M1_MAGNITUDES, E8M0_BIAS, INT4_ZERO, MXFP4_GROUP, WeightFormat, WeightMatrix

_BAND: Final = 1 << 18  # elements: 1 MiB of fp32, a core's second-level cache
_ROWS: Final = 64  # of which a band has a multiple, where it has as many: products are slower with ragged bands

# E4M3 has the bits s eeee mmm. Shifted by 4, sign kept, they are a bf16 number whose exponent lacks the difference of
# the biases, 127 - 7.
_E4M3_BITS: Final = 0x87F0 - (1 << 16)  # as int16
_E4M3_MISSING: Final = 2.0**120
_E4M3_NAN: Final = 0x7F  # without its sign


def dequantize(matrix: WeightMatrix, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The matrix [N, K] in floating point of `dtype`: each value computed in fp32 and rounded once.

    Plain weights are converted, and returned themselves where they are of `dtype` and no `out` is given. `out`
    [N, K] takes the result.
    """
    if matrix.format is WeightFormat.PLAIN:
        return matrix.data.to(dtype) if out is None else out.copy_(matrix.data)
    if out is None:
        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.data.device)
    for start, stop in row_bands(matrix, _BAND):
        out[start:stop].copy_(_values(matrix.rows(start, stop)))
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


def _values(matrix: WeightMatrix) -> Tensor:
    """A band in fp32 [n, K]."""
    data, scale = matrix.data, matrix.scale
    assert scale is not None
    width = matrix.shape[1]
    if matrix.format is WeightFormat.FP8_BLOCK:
        scales = _spread(scale, matrix.block[1], width).repeat_interleave(matrix.block[0], 0)  # [n + cut, K]
        return e4m3_values(data).mul_(scales[: data.shape[0]])
    if matrix.format is WeightFormat.INT8_CHANNEL:
        return data.float().mul_(scale.float()[:, None])
    if matrix.format is WeightFormat.MXFP4:
        halved = _half_powers_of_two(data.device)[scale.int()]  # [n, K / 32]
        return _nibbles(data, _e2m1_pairs(data.device)).mul_(_spread(halved, MXFP4_GROUP, width))
    values = _nibbles(data, _integer_pairs(data.device))
    zero = INT4_ZERO if matrix.zero is None else _spread(matrix.zero, matrix.block[1], width)
    return values.sub_(zero).mul_(_spread(scale, matrix.block[1], width))


def e4m3_values(data: Tensor) -> Tensor:
    """float8_e4m3fn to fp32, the same shape. Exact, NaN included."""
    codes = data.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    values = codes.bitwise_left_shift_(4).bitwise_and_(_E4M3_BITS).view(torch.bfloat16).float().mul_(_E4M3_MISSING)
    nan = data.view(torch.uint8).bitwise_and(_E4M3_NAN) == _E4M3_NAN
    return values.masked_fill_(nan, torch.nan) if nan.any() else values


def _nibbles(data: Tensor, pairs: Tensor) -> Tensor:
    """[n, K] fp32 from bytes [n, K / 2] and the two values that each byte stands for, `pairs` [256] as float64."""
    found = pairs.index_select(0, data.reshape(-1).int())  # one lookup of 8 bytes for two values
    return found.view(torch.float32).view(data.shape[0], 2 * data.shape[1])


def _spread(scale: Tensor, width: int, columns: int) -> Tensor:
    """Scales [n, G] of groups of `width` columns as fp32 [n, columns]."""
    return scale.float().repeat_interleave(width, 1)[:, :columns]


@lru_cache(maxsize=8)
def _e2m1_pairs(device: torch.device) -> Tensor:
    """Twice the values: their scale is halved, so that the largest one, 2 ** 128, is a number, too."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32, device=device)
    return _pairs(2 * torch.cat((magnitudes, -magnitudes)))


@lru_cache(maxsize=8)
def _integer_pairs(device: torch.device) -> Tensor:
    return _pairs(torch.arange(16, dtype=torch.float32, device=device))


def _pairs(values: Tensor) -> Tensor:
    """The values of the low and the high half of every byte, each two fp32 in the bits of one float64: [256]."""
    byte = torch.arange(256, device=values.device)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), dim=1).view(torch.float64).flatten()


@lru_cache(maxsize=8)
def _half_powers_of_two(device: torch.device) -> Tensor:
    """2 ** (code - 127) / 2 for every code of E8M0: [256] fp32. 255 is a power like any other, as for transformers."""
    exponents = torch.arange(256, device=device) - E8M0_BIAS - 1
    return torch.ldexp(torch.ones(256, device=device), exponents)
