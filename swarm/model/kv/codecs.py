"""What a stored block holds: keys and values as they are, or eight bits for each number.

A block is a flat buffer of bytes with a fixed number of tokens of one layer.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from moehive.kernels.dequantize import e4m3_values

from .layout import KvLayout

_SCALE: Final = torch.float32


class Codec(Protocol):
    """Turns keys and values [B, H, N, D] into a block and back."""

    lossless: bool

    def nbytes(self, layout: KvLayout, tokens: int) -> int:
        """Bytes of a block of so many tokens."""

    def encode(self, layout: KvLayout, keys: Tensor, values: Tensor, block: Tensor) -> None:
        """Fill `block` [nbytes] uint8 from keys and values [B, H, N, D]."""

    def decode(self, layout: KvLayout, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill keys and values [B, H, m * N, D], which may have any strides, from m blocks [m, nbytes] uint8."""


class RawCodec:
    """The same bytes."""

    lossless = True

    def nbytes(self, layout: KvLayout, tokens: int) -> int:
        """See Codec."""
        return layout.packed(tokens)

    def encode(self, layout: KvLayout, keys: Tensor, values: Tensor, block: Tensor) -> None:
        """See Codec."""
        for stored, given in zip(layout.block_views(block[None], keys.shape[2]), (keys, values), strict=True):
            stored[:, :, 0].copy_(given)

    def decode(self, layout: KvLayout, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See Codec."""
        count = blocks.shape[0]
        for stored, wanted in zip(
            layout.block_views(blocks, keys.shape[2] // count), (keys, values), strict=True
        ):  # [B, H, m, N, D]
            _in_blocks(wanted, count).copy_(stored)


class EightBitCodec:
    """One byte for each number, and one fp32 scale for each token and head: its largest magnitude fills the range.

    Scales of their own let tokens be appended without knowing those to come, and nothing overflows: transformers'
    `Fp8QuantizedLayer` keeps the first call's scale, above which later numbers saturate. `code` is int8 (127 steps to
    each side) or float8_e4m3fn (three bits of mantissa).
    """

    lossless = False

    def __init__(self, code: torch.dtype) -> None:
        self._code = code
        self._largest = 127.0 if code == torch.int8 else float(torch.finfo(code).max)

    def nbytes(self, layout: KvLayout, tokens: int) -> int:
        """See Codec."""
        size = sum(rows * tokens * (dim + _SCALE.itemsize) for rows, dim in zip(layout.rows, layout.dims, strict=True))
        return -(-size // _SCALE.itemsize) * _SCALE.itemsize  # so that scales lie well in every one of many blocks

    def encode(self, layout: KvLayout, keys: Tensor, values: Tensor, block: Tensor) -> None:
        """See Codec."""
        for (scales, codes), given in zip(self._parts(layout, block[None], keys.shape[2]), (keys, values), strict=True):
            exact = given.float()  # [B, H, N, D]
            scale = exact.abs().amax(-1, keepdim=True) / self._largest  # [B, H, N, 1]
            scales[:, :, 0].copy_(scale)
            exact = exact / scale.clamp(min=torch.finfo(_SCALE).tiny)  # a vector of zeros stays one
            exact = exact.round_() if self._code == torch.int8 else exact.clamp_(-self._largest, self._largest)
            codes[:, :, 0].copy_(exact)

    def decode(self, layout: KvLayout, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """See Codec."""
        count = blocks.shape[0]
        parts = self._parts(layout, blocks, keys.shape[2] // count)
        for (scales, codes), wanted in zip(parts, (keys, values), strict=True):
            _in_blocks(wanted, count).copy_(_widen(codes).mul_(scales))

    def _parts(self, layout: KvLayout, blocks: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Scales [B, H, m, N, 1] and codes [B, H, m, N, D] of the keys, and of the values; scales lie before codes."""
        scales, codes, at = [], [], 0
        for rows, heads in zip(layout.rows, layout.heads, strict=True):
            start, at = at, at + rows * tokens * _SCALE.itemsize
            scales.append(layout.in_order(blocks[:, start:at].view(_SCALE), heads, tokens))
        for rows, heads, dim in zip(layout.rows, layout.heads, layout.dims, strict=True):
            start, at = at, at + rows * tokens * dim
            codes.append(layout.in_order(blocks[:, start:at].view(self._code), heads, tokens))
        return list(zip(scales, codes, strict=True))


def _in_blocks(whole: Tensor, count: int) -> Tensor:
    """A view [B, H, m, N, D] of [B, H, m * N, D]."""
    batch, heads, tokens, dim = whole.shape
    return whole.view(batch, heads, count, tokens // count, dim)


def _widen(codes: Tensor) -> Tensor:
    """Codes as fp32. On a CPU torch converts float8 number by number."""
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        return e4m3_values(codes)
    return codes.to(_SCALE)
