"""Quantised weights to floating point, value for value what transformers computes.

Owns the two formats of published checkpoints: FP8 with a scale per block (DeepSeek-V3, Kimi-K2) and MXFP4 (GPT-OSS).
Refuses to guess a block size from shapes: the last block of a side may be cut, so only the configuration knows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


def dequantize_fp8_block(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """`weight` [R, C] of an 8-bit float times its block's scale, computed in fp32 and rounded once to `dtype`: [R, C].

    `scale_inv` is [ceil(R / block[0]), ceil(C / block[1])] (its name on the hub; it multiplies). `out`, of `dtype`,
    takes the result where given. Raises ValueError for a scale grid of another shape.
    """
    rows, columns = weight.shape
    height, width = block
    grid = (-(-rows // height), -(-columns // width))
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"weight {(rows, columns)} in blocks of {block} needs scales {grid}, not {tuple(scale_inv.shape)}"
        )
    scales = scale_inv.float().repeat_interleave(width, 1)[:, :columns]  # [R / height, C]
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device) if out is None else out
    for index in range(grid[0]):  # one row of blocks at a time keeps the fp32 copies in cache
        band = slice(index * height, min((index + 1) * height, rows))
        out[band].copy_(weight[band].float() * scales[index])
    return out


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A GPT-OSS projection [in, out] of `dtype` from its packed form; transformers' `convert_moe_packed_tensors`.

    `blocks` is uint8 [out, in / 32, 16], two values per byte, low half first; `scales` is uint8 [out, in / 32], the
    exponent of two plus 127. Raises ValueError where the shapes do not fit each other.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"MXFP4 needs uint8 blocks [out, in / 32, 16] and scales [out, in / 32], not {blocks.dtype} "
            f"{tuple(blocks.shape)} and {scales.dtype} {tuple(scales.shape)}"
        )
    rows = blocks.shape[0]
    pairs = _byte_values(blocks.device).index_select(0, blocks.reshape(-1).int())  # [out * in / 2, 2]
    values = pairs.view(*scales.shape, -1)  # [out, in / 32, 32]
    exponents = scales.int() - _E8M0_BIAS  # [out, in / 32]
    product = torch.ldexp(values, exponents[..., None]).to(dtype)  # exact in fp32; only here is anything rounded
    return product.view(rows, -1).t().contiguous()


def _byte_values(device: torch.device) -> Tensor:
    """The two values that each byte holds: [256, 2] fp32."""
    values = torch.tensor(_FP4_VALUES, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), dim=1)
