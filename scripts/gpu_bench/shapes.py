"""Layers of the target models, with all experts on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.random_experts import CLAMPED, Kind

from moehive.kernels.expert_ffn import FfnSpec
from moehive.kernels.formats import WeightFormat

TOKENS = (1, 4, 16, 64, 512, 8192)


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer: sizes, weight format, and what they compute."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    kind: Kind
    spec: FfnSpec

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, with its share of the scales."""
        bits, scales = {
            WeightFormat.PLAIN: (16, 0.0),
            WeightFormat.FP8_BLOCK: (8, 4 / 128**2),
            WeightFormat.INT8_CHANNEL: (8, 0.0),
            WeightFormat.INT4_GROUP: (4, 2 / max(self.kind.group, 1)),
            WeightFormat.MXFP4: (4, 1 / 32),
        }[self.kind.format]
        return bits / 8 + scales

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert."""
        return 3 * self.hidden * self.inner * self.weight_bytes


SWIGLU = FfnSpec()
_BF16 = Kind(WeightFormat.PLAIN, dtype=torch.bfloat16)
_INT4 = Kind(WeightFormat.INT4_GROUP, group=32, dtype=torch.bfloat16)
LAYERS = (
    Layer("Mixtral-8x7B bf16", 8, 2, 4096, 14336, _BF16, SWIGLU),
    Layer("Qwen3-30B-A3B bf16", 128, 8, 2048, 768, _BF16, SWIGLU),
    Layer("GPT-OSS-120B mxfp4", 128, 4, 2880, 2880, Kind(WeightFormat.MXFP4, group=32), CLAMPED),
    Layer("DeepSeek-V3 fp8", 256, 8, 7168, 2048, Kind(WeightFormat.FP8_BLOCK, group=128), SWIGLU),
    Layer("Kimi-K2 int4 g32", 384, 8, 7168, 2048, _INT4, SWIGLU),
)
TINY = (
    Layer("tiny bf16", 4, 2, 64, 32, _BF16, SWIGLU),
    Layer("tiny mxfp4", 4, 2, 64, 32, Kind(WeightFormat.MXFP4, group=32), CLAMPED),
)
