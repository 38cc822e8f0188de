"""How an expert's weight matrices lie in memory: plain floating point, or one of the quantised formats.

One layout for each format, whatever the checkpoint's packing was, so that every kernel reads it the same way: rows are
outputs, columns are inputs, columns contiguous. Owns the shapes and their checks; values are computed elsewhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor


class WeightFormat(enum.Enum):
    """How a matrix is stored. Sources of each packing: docs of the functions that make them."""

    PLAIN = "plain"  # fp32, bf16, fp16
    FP8_BLOCK = "fp8-block"  # float8_e4m3fn with one fp32 scale per block (DeepSeek-V3: 128 x 128)
    INT8_CHANNEL = "int8-channel"  # symmetric int8 with one scale per row
    INT4_GROUP = "int4-group"  # unsigned 4 bits with a scale, and optionally a zero point, per row and group of columns
    MXFP4 = "mxfp4"  # E2M1 with one E8M0 exponent per row and 32 columns (OCP Microscaling Formats 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class WeightMatrix:
    """One matrix [N, K] (N outputs, K inputs).

    data:  PLAIN [N, K]; FP8_BLOCK [N, K] float8_e4m3fn; INT8_CHANNEL [N, K] int8;
           INT4_GROUP and MXFP4 [N, K / 2] uint8, column 2i in the low and 2i + 1 in the high half of byte i.
    scale: FP8_BLOCK fp32 [ceil(N / block[0]), ceil(K / block[1])]; INT8_CHANNEL floating [N];
           INT4_GROUP floating [N, ceil(K / block[1])]; MXFP4 uint8 [N, K / 32], the exponent of two plus 127.
    zero:  INT4_GROUP uint8 [N, ceil(K / block[1])], one zero point 0..15 per byte; None stands for 8 everywhere.
    block: rows and columns that share a scale; (0, 0) for PLAIN.

    A value is: PLAIN data; FP8_BLOCK and INT8_CHANNEL data * scale; INT4_GROUP (nibble - zero) * scale;
    MXFP4 E2M1(nibble) * 2 ** (scale - 127).
    """

    format: WeightFormat
    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    block: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        packed = self.format in (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
        return self.data.shape[0], self.data.shape[1] * (2 if packed else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(part.nbytes for part in (self.data, self.scale, self.zero) if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMatrices:
    """One expert: gate_up [2I, H] (rows gate then up, or alternating where the model's gate says so), down [H, I]."""

    gate_up: WeightMatrix
    down: WeightMatrix
    gate_up_bias: Tensor | None = None  # [2I]
    down_bias: Tensor | None = None  # [H]

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        biases = sum(bias.nbytes for bias in (self.gate_up_bias, self.down_bias) if bias is not None)
        return self.gate_up.nbytes + self.down.nbytes + biases
