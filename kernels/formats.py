"""How an expert's weight matrices lie in memory: plain floating point, or one of the quantised formats.

One layout for each format, whatever the checkpoint's packing was, so that every kernel reads it the same way: rows are
outputs, columns are inputs, columns contiguous. Owns the shapes and their checks; values are computed elsewhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor


class WeightFormat(enum.Enum):
    """How a matrix is stored. Sources of each packing: docs of the functions that make them."""

    PLAIN = "plain"  # fp32, bf16, fp16
    FP8_BLOCK = "fp8-block"  # float8_e4m3fn with one fp32 scale per block (DeepSeek-V3: 128 x 128)
    INT8_CHANNEL = "int8-channel"  # symmetric int8 with one scale per row
    INT4_GROUP = "int4-group"  # unsigned 4 bits with a scale, and optionally a zero point, per row and group of columns
    MXFP4 = "mxfp4"  # E2M1 with one E8M0 exponent per row and 32 columns (OCP Microscaling Formats 1.0)


MXFP4_GROUP: Final = 32  # columns that share an exponent
# E2M1 without its sign, by code: two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3)
E2M1_MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E8M0_BIAS: Final = 127
INT4_ZERO: Final = 8  # of matrices without zero points
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DATA: Final = {
    WeightFormat.PLAIN: _FLOATS, WeightFormat.FP8_BLOCK: (torch.float8_e4m3fn,),
    WeightFormat.INT8_CHANNEL: (torch.int8,), WeightFormat.INT4_GROUP: (torch.uint8,),
    WeightFormat.MXFP4: (torch.uint8,),
}  # fmt: skip
_SCALE: Final = {
    WeightFormat.FP8_BLOCK: (torch.float32,), WeightFormat.INT8_CHANNEL: _FLOATS, WeightFormat.INT4_GROUP: _FLOATS,
    WeightFormat.MXFP4: (torch.uint8,),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class WeightMatrix:
    """One matrix [N, K] (N outputs, K inputs).

    data:  PLAIN [N, K]; FP8_BLOCK [N, K] float8_e4m3fn; INT8_CHANNEL [N, K] int8;
           INT4_GROUP and MXFP4 [N, K / 2] uint8, column 2i in the low and 2i + 1 in the high half of byte i.
    scale: FP8_BLOCK fp32 [ceil(N / block[0]), ceil(K / block[1])]; INT8_CHANNEL floating [N];
           INT4_GROUP floating [N, ceil(K / block[1])]; MXFP4 uint8 [N, ceil(K / 32)], the exponent of two plus 127.
    zero:  INT4_GROUP uint8 [N, ceil(K / block[1])], one zero point 0..15 per byte; None stands for 8 everywhere.
    block: rows and columns that share a scale: (0, 0) for PLAIN, (1, K) for INT8_CHANNEL, (1, 32) for MXFP4.

    A value is: PLAIN data; FP8_BLOCK and INT8_CHANNEL data * scale; INT4_GROUP (nibble - zero) * scale;
    MXFP4 E2M1(nibble) * 2 ** (scale - 127).

    Raises ValueError for parts that do not fit each other.
    """

    format: WeightFormat
    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    block: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        name = self.format.value
        if self.data.ndim != 2 or self.data.dtype not in _DATA[self.format]:
            raise ValueError(f"{name} data are {self.data.dtype} {tuple(self.data.shape)}")
        if self.format is WeightFormat.PLAIN:
            if self.scale is not None or self.zero is not None or self.block != (0, 0):
                raise ValueError("plain weights have no scales")
            return
        if self.block != self._possible_block():
            raise ValueError(f"{name} weights {self.shape} in blocks of {self.block}")
        if self.scale is None or self.scale.dtype not in _SCALE[self.format] or self.scale.shape != self.grid:
            found = None if self.scale is None else (self.scale.dtype, tuple(self.scale.shape))
            raise ValueError(f"{name} weights {self.shape} in blocks of {self.block} need scales {self.grid}: {found}")
        zero = self.zero
        if zero is not None and (self.format is not WeightFormat.INT4_GROUP or zero.shape != self.grid):
            raise ValueError(f"{name} weights {self.shape} in blocks of {self.block}: zeros {tuple(zero.shape)}")

    def _possible_block(self) -> tuple[int, int]:
        """The given block, made possible."""
        if self.format is WeightFormat.INT8_CHANNEL:
            return (1, self.shape[1])
        if self.format is WeightFormat.MXFP4:
            return (1, MXFP4_GROUP)
        height, width = self.block
        return (1 if self.format is WeightFormat.INT4_GROUP else max(height, 1), max(width, 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        packed = self.format in (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
        return self.data.shape[0], self.data.shape[1] * (2 if packed else 1)

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the scales; () for PLAIN."""
        if self.format is WeightFormat.PLAIN:
            return ()
        if self.format is WeightFormat.INT8_CHANNEL:
            return (self.shape[0],)
        return tuple(-(-side // step) for side, step in zip(self.shape, self.block, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(part.nbytes for part in (self.data, self.scale, self.zero) if part is not None)

    def rows(self, start: int, stop: int) -> WeightMatrix:
        """Rows [start, stop), as views. Raises ValueError where `start` is not the first row of a block."""
        if self.format is WeightFormat.PLAIN:
            return replace(self, data=self.data[start:stop])
        assert self.scale is not None
        height = self.block[0]
        if start % height:
            raise ValueError(f"row {start} lies within a block of {height}")
        blocks = slice(start // height, -(-stop // height))
        zero = None if self.zero is None else self.zero[blocks]
        return replace(self, data=self.data[start:stop], scale=self.scale[blocks], zero=zero)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """One expert: gate_up [2I, H] (rows gate then up, or alternating where the model's gate says so), down [H, I].

    Raises ValueError for matrices and biases that do not fit each other.
    """

    gate_up: WeightMatrix
    down: WeightMatrix
    gate_up_bias: Tensor | None = None  # [2I]
    down_bias: Tensor | None = None  # [H]

    def __post_init__(self) -> None:
        (doubled, hidden), down = self.gate_up.shape, self.down.shape
        if doubled % 2 or down != (hidden, doubled // 2):
            raise ValueError(f"gate_up {self.gate_up.shape} and down {down} are not [2I, H] and [H, I]")
        for bias, size in ((self.gate_up_bias, doubled), (self.down_bias, hidden)):
            if bias is not None and tuple(bias.shape) != (size,):
                raise ValueError(f"bias {tuple(bias.shape)} where [{size}] is needed")

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        biases = sum(bias.nbytes for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return self.gate_up.nbytes + self.down.nbytes + biases


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [N, K] as the `data` of a matrix, uint8 [N, K / 2]. Raises ValueError for an odd K."""
    if codes.shape[1] % 2:
        raise ValueError(f"{codes.shape[1]} columns of 4 bits do not fill bytes")
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_nibbles(data: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(1)
