"""Floating-point weights to the quantised formats, by rounding to nearest: for tests, benchmarks and one's own models.

No calibration: what GPTQ or AWQ gain by looking at activations is not done here. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import E2M1_MAGNITUDES, E8M0_BIAS, INT4_ZERO, MXFP4_GROUP, WeightFormat, WeightMatrix, pack_nibbles

_E4M3_MAX: Final = 448.0
_INT8_MAX: Final = 127
_INT4_MAX: Final = 15
_E2M1_EXPONENT: Final = 2  # of the largest value, 6 = 1.5 * 2 ** 2


def quantize_fp8_block(weight: Tensor, block: tuple[int, int] = (128, 128)) -> WeightMatrix:
    """[N, K] as float8_e4m3fn; each block's scale takes its largest magnitude to 448 (DeepSeek-V3)."""
    (rows, columns), (height, width) = weight.shape, block
    padded = F.pad(weight.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale = _not_zero(blocks.abs().amax((1, 3)) / _E4M3_MAX)  # [N / height, K / width]
    data = (blocks / scale[:, None, :, None]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return WeightMatrix(
        WeightFormat.FP8_BLOCK, data.view(padded.shape)[:rows, :columns].contiguous(), scale, block=block
    )


def quantize_int8_channel(weight: Tensor) -> WeightMatrix:
    """[N, K] as symmetric int8; each row's scale, fp32, takes its largest magnitude to 127."""
    scale = _not_zero(weight.float().abs().amax(1) / _INT8_MAX)  # [N]
    data = (weight.float() / scale[:, None]).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return WeightMatrix(WeightFormat.INT8_CHANNEL, data, scale, block=(1, weight.shape[1]))


def quantize_int4_group(
    weight: Tensor, group: int = 128, *, zero_points: bool = False, dtype: torch.dtype = torch.float32
) -> WeightMatrix:
    """[N, K] as 4 bits with a scale of `dtype` for each row and `group` of columns.

    Symmetric around 8 (-8 to 7 steps), or with `zero_points` from each group's smallest to its largest value. K must
    be even and a multiple of `group`; raises ValueError else.
    """
    rows, columns = weight.shape
    if columns % group or columns % 2:
        raise ValueError(f"{columns} columns in groups of {group}")
    values = weight.float().view(rows, -1, group)  # [N, G, group]
    if zero_points:
        low, high = values.amin(2).clamp(max=0), values.amax(2).clamp(min=0)  # [N, G]
        scale = _not_zero((high - low) / _INT4_MAX).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, _INT4_MAX)
    else:
        scale = _not_zero(values.abs().amax(2) / (INT4_ZERO - 1)).to(dtype)
        zero = torch.full_like(scale, INT4_ZERO, dtype=torch.float32)
    codes = (values / scale.float()[..., None] + zero[..., None]).round().clamp(0, _INT4_MAX)
    points = zero.to(torch.uint8) if zero_points else None
    data = pack_nibbles(codes.view(rows, columns))
    return WeightMatrix(WeightFormat.INT4_GROUP, data, scale, points, block=(1, group))


def quantize_mxfp4(weight: Tensor) -> WeightMatrix:
    """[N, K] as E2M1 with an exponent for each row and 32 columns (OCP Microscaling Formats 1.0, section 6.3).

    The shared exponent is that of the group's largest magnitude less that of 6; magnitudes beyond 6 become 6. K must
    be a multiple of 32; raises ValueError else.
    """
    rows, columns = weight.shape
    if columns % MXFP4_GROUP:
        raise ValueError(f"{columns} columns in groups of {MXFP4_GROUP}")
    values = weight.float().view(rows, -1, MXFP4_GROUP)  # [N, G, 32]
    _, exponent = torch.frexp(values.abs().amax(2))  # the largest magnitude is in [0.5, 1) * 2 ** exponent
    scale = (exponent - 1 - _E2M1_EXPONENT + E8M0_BIAS).clamp(0, 254)  # [N, G]
    scaled = torch.ldexp(values, (E8M0_BIAS - scale)[..., None])
    table = torch.tensor(E2M1_MAGNITUDES, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    # A value in the middle goes to the even code: the upper one of every second pair.
    low, high = torch.bucketize(scaled.abs(), middles), torch.bucketize(scaled.abs(), middles, right=True)
    codes = torch.where(low % 2 == 0, low, high) + 8 * torch.signbit(scaled)  # [N, G, 32]
    data = pack_nibbles(codes.view(rows, columns))
    return WeightMatrix(WeightFormat.MXFP4, data, scale.to(torch.uint8), block=(1, MXFP4_GROUP))


def _not_zero(scale: Tensor) -> Tensor:
    """A group of zeros gets scale 1."""
    return torch.where(scale > 0, scale, 1.0)
