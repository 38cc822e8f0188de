"""The manifest: what a converted model consists of, and the hash that names each part.

The canonical bytes (sorted keys, no white space, ASCII JSON) are hashed like any other object, and that root is the
model id: a different byte in any shard, tensor table or model fact is a different model.

JSON names follow mission row F1. A `row` layout is the source's own orientation; column slices (`sliceDim` and its
companions) belong to tensor parallelism.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import limits
from .chunks import CHUNK_SIZE, object_root
from .errors import ManifestError
from .ids import ExpertKey, ModelId, ShardHash, is_hash
from .manifest_json import Reader, drop_none

MANIFEST_NAME = "manifest.json"
FORMAT = "moehive"
VERSION = 1
HASH_ALGORITHM = "blake3-chunked"

# Bytes per element, by safetensors dtype name.
ITEM_SIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

_SAFE_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


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


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the experts' weights are stored; None in the manifest means plain floating point."""

    method: str  # "fp8-block" (F8_E4M3 weight, fp32 `weight_scale_inv` per block) or "mxfp4"
    block: tuple[int, int] | None = None  # rows, columns of one fp8 block


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


@dataclass(frozen=True)
class Manifest:
    """A converted model. Construct through `from_bytes`, or by hand followed by `check`."""

    model: ModelFacts
    shards: tuple[ShardEntry, ...]
    tensors: Mapping[str, TensorEntry]
    sharding_strategy: ShardingStrategy = ShardingStrategy.EXPERT
    default_weight_layout: Layout = Layout.ROW
    chunk_size: int = field(default=CHUNK_SIZE)

    # --- bytes ----------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return json.dumps(_manifest_json(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Read and check canonical bytes. Raises ManifestError, whatever the bytes."""
        if len(data) > limits.MAX_MANIFEST_BYTES:
            raise ManifestError(f"manifest of {len(data)} bytes, at most {limits.MAX_MANIFEST_BYTES} are read")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"manifest is not JSON: {error}") from error
        manifest = _read_manifest(Reader(document, "manifest"))
        manifest.check()
        if manifest.to_bytes() != data:
            raise ManifestError("manifest is not in canonical form; it was edited after conversion")
        return manifest

    @cached_property
    def model_id(self) -> ModelId:
        """The root hash of the canonical bytes."""
        return ModelId(object_root(self.to_bytes()))

    # --- look-ups -------------------------------------------------------------------------------------------------

    @cached_property
    def experts(self) -> Mapping[ExpertKey, ShardEntry]:
        """Every routed expert's shard, multi-token-prediction layers included."""
        return {shard.expert_key: shard for shard in self.shards if shard.expert_key is not None}

    @cached_property
    def tensors_of(self) -> Mapping[ShardHash, Mapping[str, TensorEntry]]:
        """Tensor tables by shard hash, each in file order."""
        tables: dict[ShardHash, dict[str, TensorEntry]] = {}
        for name, entry in sorted(self.tensors.items(), key=lambda item: (item[1].shard, item[1].offset)):
            tables.setdefault(self.shards[entry.shard].hash, {})[name] = entry
        return tables

    def of_type(self, *types: ShardType) -> tuple[ShardEntry, ...]:
        """Shards of the given types, in manifest order."""
        return tuple(shard for shard in self.shards if shard.type in types)

    @cached_property
    def skeleton(self) -> tuple[ShardEntry, ...]:
        """What a client needs besides experts: dense part, shared experts, assets (no multi-token-prediction group)."""
        wanted = self.of_type(ShardType.DENSE, ShardType.SHARED, ShardType.ASSET)
        return tuple(shard for shard in wanted if shard.group is None)

    # --- consistency ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ManifestError where the manifest contradicts itself."""
        if self.chunk_size != CHUNK_SIZE:
            raise ManifestError(f"chunkSize {self.chunk_size}: this build reads {CHUNK_SIZE} only")
        if len(self.shards) > limits.MAX_SHARDS or len(self.tensors) > limits.MAX_TENSORS:
            raise ManifestError(f"{len(self.shards)} shards and {len(self.tensors)} tensors are over the limits")
        _check_model(self.model)
        for shard in self.shards:
            _check_shard(shard)
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ManifestError("two shards name the same file")
        if len(self.experts) != sum(shard.expert_key is not None for shard in self.shards):
            raise ManifestError("two shards name the same expert")
        for name, entry in self.tensors.items():
            _check_tensor(name, entry, self.shards)
        self._check_experts_complete()

    def _check_experts_complete(self) -> None:
        layers = (*self.model.moe_layers, *self.model.mtp_layers)
        wanted = {ExpertKey(layer, expert) for layer in layers for expert in range(self.model.num_experts)}
        if wanted != set(self.experts):
            odd = sorted(wanted ^ set(self.experts))[0]
            raise ManifestError(f"expert {odd} is missing or is not one of the model's")


def is_safe_path(path: str) -> bool:
    """Whether a relative file name from a manifest may be created below a directory of ours.

    No parent, hidden or absolute segments, nothing that a shell or Python would execute.
    """
    segments = path.split("/")
    plain = all(_SAFE_SEGMENT.fullmatch(segment) for segment in segments)
    return plain and len(path) <= limits.MAX_FILE_NAME and not path.endswith((".py", ".sh")) and path != MANIFEST_NAME


def _check_model(model: ModelFacts) -> None:
    sizes = (model.hidden_size, model.intermediate_size, model.num_experts, model.top_k)
    layers = (*model.moe_layers, *model.mtp_layers)
    if min(sizes) < 1 or model.top_k > model.num_experts or max(sizes) > 1 << 24:
        raise ManifestError(f"impossible model sizes {sizes}")
    if not model.moe_layers or len(set(layers)) != len(layers) or len(layers) > 4096 or max(layers) > 1 << 16:
        raise ManifestError("moeLayers and mtpLayers must be distinct layer numbers, at least one")
    if len(layers) * model.num_experts > limits.MAX_SHARDS:
        raise ManifestError("more experts than shards are allowed")


def _check_shard(shard: ShardEntry) -> None:
    if not is_safe_path(shard.file):
        raise ManifestError(f"file name {shard.file!r} is not allowed")
    if not 0 <= shard.size <= limits.MAX_SHARD_BYTES or not is_hash(shard.hash):
        raise ManifestError(f"{shard.file}: size or hash is malformed")
    if (shard.type is ShardType.EXPERT) != (shard.expert_key is not None):
        raise ManifestError(f"{shard.file}: an expertKey belongs to expert shards, and only to them")


def _check_tensor(name: str, entry: TensorEntry, shards: tuple[ShardEntry, ...]) -> None:
    if entry.dtype not in ITEM_SIZE:
        raise ManifestError(f"tensor {name}: unknown dtype {entry.dtype!r}")
    if (
        not 0 <= entry.shard < len(shards)
        or len(entry.shape) > limits.MAX_DIMENSIONS
        or min(entry.shape, default=0) < 0
    ):
        raise ManifestError(f"tensor {name}: shard or shape is malformed")
    if entry.size != math.prod(entry.shape) * ITEM_SIZE[entry.dtype]:
        raise ManifestError(f"tensor {name}: {entry.size} bytes do not fit shape {entry.shape} of {entry.dtype}")
    if entry.offset < 0 or entry.offset + entry.size > shards[entry.shard].size:
        raise ManifestError(f"tensor {name}: lies outside its shard")


# --- JSON ---------------------------------------------------------------------------------------------------------


def _manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "hashAlgorithm": HASH_ALGORITHM,
        "chunkSize": manifest.chunk_size,
        "shardingStrategy": manifest.sharding_strategy.value,
        "defaultWeightLayout": manifest.default_weight_layout.value,
        "model": _model_json(manifest.model),
        "shards": [_shard_json(shard) for shard in manifest.shards],
        "tensors": {
            name: {
                "shard": entry.shard,
                "offset": entry.offset,
                "size": entry.size,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "layout": entry.layout.value,
            }
            for name, entry in manifest.tensors.items()
        },
    }


def _model_json(model: ModelFacts) -> dict[str, Any]:
    ffn, quantization = model.ffn, model.quantization
    return drop_none(
        {
            "name": model.name,
            "modelType": model.model_type,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "hiddenSize": model.hidden_size,
            "intermediateSize": model.intermediate_size,
            "numExperts": model.num_experts,
            "topK": model.top_k,
            "moeLayers": list(model.moe_layers),
            "mtpLayers": list(model.mtp_layers),
            "expertFfn": drop_none(
                {
                    "gate": ffn.gate.value,
                    "activation": ffn.activation,
                    "transposed": ffn.transposed,
                    "bias": ffn.bias,
                    "alpha": ffn.alpha,
                    "limit": ffn.limit,
                }
            ),
            "quantization": quantization
            and drop_none({"method": quantization.method, "block": quantization.block and list(quantization.block)}),
        }
    )


def _shard_json(shard: ShardEntry) -> dict[str, Any]:
    return drop_none(
        {
            "file": shard.file,
            "type": shard.type.value,
            "size": shard.size,
            "hash": shard.hash,
            "expertKey": str(shard.expert_key) if shard.expert_key else None,
            "group": shard.group,
        }
    )


def _read_manifest(reader: Reader) -> Manifest:
    found = (reader.text("format"), reader.integer("version"), reader.text("hashAlgorithm"))
    if found != (FORMAT, VERSION, HASH_ALGORITHM):
        raise ManifestError(
            f"format, version, hashAlgorithm are {found}; this build reads {(FORMAT, VERSION, HASH_ALGORITHM)}"
        )
    manifest = Manifest(
        sharding_strategy=reader.choice("shardingStrategy", ShardingStrategy),
        default_weight_layout=reader.choice("defaultWeightLayout", Layout),
        chunk_size=reader.integer("chunkSize"),
        model=_read_model(reader.child("model")),
        shards=tuple(_read_shard(shard) for shard in reader.children("shards", limits.MAX_SHARDS)),
        tensors={name: _read_tensor(entry) for name, entry in reader.named("tensors", limits.MAX_TENSORS)},
    )
    reader.done()
    return manifest


def _read_model(reader: Reader) -> ModelFacts:
    ffn = reader.child("expertFfn")
    quantization = reader.optional_child("quantization")
    facts = ModelFacts(
        name=reader.text("name"),
        model_type=reader.text("modelType"),
        architecture=reader.text("architecture"),
        dtype=reader.text("dtype"),
        hidden_size=reader.integer("hiddenSize"),
        intermediate_size=reader.integer("intermediateSize"),
        num_experts=reader.integer("numExperts"),
        top_k=reader.integer("topK"),
        moe_layers=reader.integers("moeLayers"),
        mtp_layers=reader.integers("mtpLayers"),
        ffn=ExpertFfn(
            gate=ffn.choice("gate", Gate),
            activation=ffn.text("activation"),
            transposed=ffn.boolean("transposed"),
            bias=ffn.boolean("bias"),
            alpha=ffn.optional_number("alpha"),
            limit=ffn.optional_number("limit"),
        ),
        quantization=_read_quantization(quantization) if quantization else None,
    )
    ffn.done()
    reader.done()
    return facts


def _read_quantization(reader: Reader) -> Quantization:
    method, block = reader.text("method"), reader.optional_integers("block")
    reader.done()
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ManifestError(f"quantization block {block} is not two positive sizes")
    return Quantization(method, (block[0], block[1]) if block else None)


def _read_shard(reader: Reader) -> ShardEntry:
    key = reader.optional_text("expertKey")
    entry = ShardEntry(
        file=reader.text("file"),
        type=reader.choice("type", ShardType),
        size=reader.integer("size"),
        hash=ShardHash(reader.text("hash")),
        expert_key=ExpertKey.parse(key) if key is not None else None,
        group=reader.optional_text("group"),
    )
    reader.done()
    return entry


def _read_tensor(reader: Reader) -> TensorEntry:
    entry = TensorEntry(
        shard=reader.integer("shard"),
        offset=reader.integer("offset"),
        size=reader.integer("size"),
        shape=reader.integers("shape"),
        dtype=reader.text("dtype"),
        layout=reader.choice("layout", Layout),
    )
    reader.done()
    return entry
