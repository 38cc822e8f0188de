"""The pieces of a manifest: what is known of a model, its files and its tensors. Plain values without rules."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from .ids import ExpertKey, ShardHash

# Bytes per element, by safetensors dtype name.
ITEM_SIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class ShardingStrategy(enum.StrEnum):
    """How tensors are grouped into shards."""

    EXPERT = "expert"
    LAYER = "layer"
    FIXED = "fixed"


class ShardType(enum.StrEnum):
    """What a shard holds."""

    DENSE = "dense"
    EXPERT = "expert"
    SHARED = "shared"  # always-on experts: part of the dense skeleton, kept apart so that they can be pinned
    ASSET = "asset"  # configuration, tokenizer
    ADAPTER = "adapter"


class Layout(enum.StrEnum):
    """Orientation of a weight on disk."""

    ROW = "row"
    COLUMN = "column"


class Gate(enum.StrEnum):
    """How the first projection of an expert is combined with its gate (reference: transformers `_apply_gate`)."""

    CONCATENATED = "concatenated"  # [gate; up] halves: act(gate) * up
    CLAMPED_INTERLEAVED = "clamped-interleaved"  # GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), both clamped


@dataclass(frozen=True, slots=True)
class ExpertFfn:
    """The mathematics of one expert, enough for a peer that never sees the model's Python class."""

    gate: Gate
    activation: str  # transformers' ACT2FN name, e.g. "silu"
    transposed: bool = False  # weights are [in, out] and applied as x @ W
    bias: bool = False
    alpha: float | None = None  # clamped-interleaved only
    limit: float | None = None


class QuantMethod(enum.StrEnum):
    """How a published checkpoint packs a quantised weight [out, in]. The bytes of a shard are the checkpoint's own."""

    FP8_BLOCK = "fp8-block"  # DeepSeek-V3: F8_E4M3 weight, fp32 `weight_scale_inv` per block
    MXFP4 = "mxfp4"  # GPT-OSS: `blocks` and `scales`
    INT4_PACKED = "int4-pack-quantized"  # compressed-tensors: int32 `weight_packed` along in, low bits first, plus 8
    INT4_AWQ = "int4-awq"  # AutoAWQ's "gemm": int32 `qweight` [in, out / 8], columns interleaved; `qzeros`, `scales`
    INT4_GPTQ = "int4-gptq"  # int32 `qweight` [in / 8, out]; `qzeros` minus one, `scales`, `g_idx` in order
    INT4_GPTQ_V2 = "int4-gptq-v2"  # the same with `qzeros` as they are


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the experts' weights are stored; None in the manifest means plain floating point.

    With 4 bits some experts may be plain all the same: their tensors' names say so.
    """

    method: QuantMethod
    block: tuple[int, int] | None = None  # rows, columns that share a scale: given for all but MXFP4


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What peers and planners need to know without reading config.json."""

    name: str  # for people; not unique
    model_type: str  # transformers' model_type after conversion
    architecture: str
    dtype: str  # safetensors name of the dtype the checkpoint computes in, e.g. "BF16"
    hidden_size: int
    intermediate_size: int  # of one routed expert
    num_experts: int  # routed experts per MoE layer
    top_k: int
    moe_layers: tuple[int, ...]  # decoder layers with routed experts, ascending
    ffn: ExpertFfn
    quantization: Quantization | None = None
    mtp_layers: tuple[int, ...] = ()  # multi-token-prediction layers; their shards carry group "mtp"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One file: a safetensors file, or an asset."""

    file: str  # relative to the converted directory
    type: ShardType
    size: int  # bytes
    hash: ShardHash
    expert_key: ExpertKey | None = None
    group: str | None = None  # "mtp": not needed for plain generation


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies; `offset` counts from the start of the shard file."""

    shard: int
    offset: int
    size: int  # bytes
    shape: tuple[int, ...]
    dtype: str
    layout: Layout = Layout.ROW
