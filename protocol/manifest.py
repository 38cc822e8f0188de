"""The manifest: what a converted model consists of, and the hash that names each part.

The canonical bytes (sorted keys, no white space, ASCII JSON) are hashed like any other object, and that root is the
model id: a different byte in any shard, tensor table or model fact is a different model.

JSON names follow mission row F1. A `row` layout is the source's own orientation; column slices (`sliceDim` and its
companions) belong to tensor parallelism.
"""

from __future__ import annotations

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
from .json_reader import Reader
from .manifest_json import model_json, read_model, read_shard, read_tensor, shard_json, tensor_json
from .manifest_parts import (
    ITEM_SIZE,
    ExpertFfn,
    Gate,
    Layout,
    ModelFacts,
    Quantization,
    QuantMethod,
    ShardEntry,
    ShardingStrategy,
    ShardType,
    TensorEntry,
)

__all__ = [
    "ITEM_SIZE", "MANIFEST_NAME", "MANIFEST_START", "REPORT_NAME", "ExpertFfn", "Gate", "Layout", "Manifest",
    "ModelFacts", "QuantMethod", "Quantization", "ShardEntry", "ShardType", "ShardingStrategy", "TensorEntry",
    "is_safe_path",
]  # fmt: skip

MANIFEST_NAME = "manifest.json"
MANIFEST_START = b'{"chunkSize":'  # every manifest in canonical form begins so; other files rarely do
REPORT_NAME = "conversion.json"  # beside it: what the conversion found, and the model id it wrote
FORMAT = "moehive"
VERSION = 1
HASH_ALGORITHM = "blake3-chunked"

_SAFE_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


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
    plain = all(_SAFE_SEGMENT.fullmatch(segment) for segment in segments) and len(path) <= limits.MAX_FILE_NAME
    return plain and not path.endswith((".py", ".sh")) and path not in (MANIFEST_NAME, REPORT_NAME)


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
        "model": model_json(manifest.model),
        "shards": [shard_json(shard) for shard in manifest.shards],
        "tensors": {name: tensor_json(entry) for name, entry in manifest.tensors.items()},
    }


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
        model=read_model(reader.child("model")),
        shards=tuple(read_shard(shard) for shard in reader.children("shards", limits.MAX_SHARDS)),
        tensors={name: read_tensor(entry) for name, entry in reader.named("tensors", limits.MAX_TENSORS)},
    )
    reader.done()
    return manifest
