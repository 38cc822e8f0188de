"""Expert layers of published models, and what one call of such a layer has to read and to compute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from moehive.kernels.expert_ffn import CLAMPED_INTERLEAVED, FfnSpec
from moehive.kernels.formats import MXFP4_GROUP, WeightFormat

SWIGLU: Final = FfnSpec()
CLAMPED: Final = FfnSpec(gate=CLAMPED_INTERLEAVED, alpha=1.702, limit=7.0)  # GPT-OSS
_FP8_BLOCK: Final = 128
_INT4_GROUP: Final = 32


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights are kept: format, columns that share a scale (FP8: rows, too), dtype of plain values or of scales."""

    format: WeightFormat
    group: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, with its share of the scales; those of INT8_CHANNEL do not matter."""
        if self.format is WeightFormat.PLAIN:
            return float(self.dtype.itemsize)
        if self.format is WeightFormat.INT8_CHANNEL:
            return 1.0
        if self.format is WeightFormat.FP8_BLOCK:
            return 1.0 + 4 / self.group**2
        scale = 1 if self.format is WeightFormat.MXFP4 else self.dtype.itemsize
        return 0.5 + scale / self.group


BF16: Final = Stored(WeightFormat.PLAIN)
FP8: Final = Stored(WeightFormat.FP8_BLOCK, _FP8_BLOCK)
INT4: Final = Stored(WeightFormat.INT4_GROUP, _INT4_GROUP)
MXFP4: Final = Stored(WeightFormat.MXFP4, MXFP4_GROUP)
FORMATS: Final = {
    "fp32": Stored(WeightFormat.PLAIN, dtype=torch.float32), "bf16": BF16, "fp8": FP8,
    "int8": Stored(WeightFormat.INT8_CHANNEL), "int4": INT4, "mxfp4": MXFP4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The experts of one layer: sizes, what they compute, and how the model's publisher stores their weights."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    stored: Stored = BF16
    spec: FfnSpec = SWIGLU

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return 3 * self.hidden * self.inner * self.stored.weight_bytes

    def flops(self, rows: int) -> float:
        """Floating-point operations of the products on so many rows, of all experts together."""
        return 6.0 * rows * self.hidden * self.inner

    def bytes_moved(self, tokens: int, active: int, element: int = 2) -> float:
        """Bytes that a call has to move: the weights of the `active` experts that are hit, once, and the activations.

        Activations have `element` bytes: x read, the inner rows and the outputs written and read, the sum written.
        """
        rows = tokens * self.top_k
        return active * self.expert_bytes + element * (2 * tokens * self.hidden + 2 * rows * (self.inner + self.hidden))

    def dense_bytes(self, tokens: int, element: int = 2) -> float:
        """Peak memory of a dense layer with as many parameters, all used by every token: weights and activations.

        Weights and activations have `element` bytes: gate and up [T, 2EI], and beside them their product [T, EI].
        """
        width = self.experts * self.inner
        return element * (3 * self.hidden * width + tokens * (3 * width + 2 * self.hidden))

    def kept_as(self, stored: Stored) -> LayerShape:
        """The same layer in another format."""
        return replace(self, stored=stored)


SHAPES: Final = {
    shape.name.lower(): shape
    for shape in (
        LayerShape("Mixtral-8x7B", 8, 2, 4096, 14336),
        LayerShape("Qwen3-30B-A3B", 128, 8, 2048, 768),
        LayerShape("Qwen3-235B-A22B", 128, 8, 4096, 1536),
        LayerShape("Qwen3-Next-80B-A3B", 512, 10, 2048, 512),
        LayerShape("GPT-OSS-20B", 32, 4, 2880, 2880, MXFP4, CLAMPED),
        LayerShape("GPT-OSS-120B", 128, 4, 2880, 2880, MXFP4, CLAMPED),
        LayerShape("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
        LayerShape("DeepSeek-V3", 256, 8, 7168, 2048, FP8),
        LayerShape("Kimi-K2", 384, 8, 7168, 2048, INT4),
        LayerShape("Phi-3.5-MoE", 16, 2, 4096, 6400),
        LayerShape("OLMoE-1B-7B", 64, 8, 2048, 1024),
    )
}
