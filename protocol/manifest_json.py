"""The JSON form of a manifest's pieces, written and read back. Names follow mission row F1."""

from __future__ import annotations

from typing import Any

from .errors import ManifestError
from .ids import ExpertKey, ShardHash
from .json_reader import Reader, drop_none
from .manifest_parts import (
    ExpertFfn,
    Gate,
    Layout,
    ModelFacts,
    Quantization,
    QuantMethod,
    ShardEntry,
    ShardType,
    TensorEntry,
)


def tensor_json(entry: TensorEntry) -> dict[str, Any]:
    """One entry of the tensor table."""
    return {
        "shard": entry.shard,
        "offset": entry.offset,
        "size": entry.size,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "layout": entry.layout.value,
    }


def model_json(model: ModelFacts) -> dict[str, Any]:
    """The model's facts."""
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
            "quantization": quantization and _quantization_json(quantization),
        }
    )


def _quantization_json(quantization: Quantization) -> dict[str, Any]:
    block = quantization.block
    return drop_none({"method": quantization.method.value, "block": block and list(block)})


def shard_json(shard: ShardEntry) -> dict[str, Any]:
    """One shard."""
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


def read_model(reader: Reader) -> ModelFacts:
    """Inverse of `model_json`. Raises ManifestError."""
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
    method, block = reader.choice("method", QuantMethod), reader.optional_integers("block")
    reader.done()
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ManifestError(f"quantization block {block} is not two positive sizes")
    return Quantization(method, (block[0], block[1]) if block else None)


def read_shard(reader: Reader) -> ShardEntry:
    """Inverse of `shard_json`. Raises ManifestError."""
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


def read_tensor(reader: Reader) -> TensorEntry:
    """Inverse of `tensor_json`. Raises ManifestError."""
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
