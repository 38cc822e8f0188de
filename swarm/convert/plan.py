"""From a checkpoint's headers to the complete list of what its conversion writes. No weight is read.

Refuses, before anything is written, what moehive cannot run and what contradicts itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moehive.protocol.errors import CheckpointError, UnsupportedModel
from moehive.protocol.manifest import ModelFacts

from .assets import plan_assets
from .dense import plan_dense
from .experts import ExpertShape, plan_experts
from .families import REFUSED, family_of, ffn_of, integer
from .layout import ConversionPlan, PlannedFile
from .names import is_router, layer_of, looks_like_expert
from .quantization import scheme_of
from .source import Checkpoint, SourceTensor

_DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plan_conversion(checkpoint: Checkpoint, name: str | None = None) -> ConversionPlan:
    """The plan for one checkpoint; `name` is for people. Raises UnsupportedModel, CheckpointError."""
    config = checkpoint.config
    _refuse_dense(checkpoint)
    family = family_of(config)
    scheme = scheme_of(config)
    shape = ExpertShape(
        integer(config, "hidden_size"), integer(config, family.intermediate), ffn_of(family, config), scheme
    )
    num_experts, num_layers = integer(config, *family.experts), integer(config, "num_hidden_layers")
    routed = {key: tensor for key, tensor in checkpoint.tensors.items() if looks_like_expert(key)}
    rest = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in routed}
    experts = plan_experts(routed, shape, num_experts, num_layers)
    layers = sorted({file.expert_key.layer for file in experts if file.expert_key})
    _check_layers(rest, layers, num_layers)
    dense = plan_dense(rest, scheme, num_layers)
    assets, notes = plan_assets(checkpoint.directory, config, family, dense)
    facts = ModelFacts(
        name=name or model_name(checkpoint.directory),
        model_type=family.native_type or str(config["model_type"]),
        architecture=family.architecture,
        dtype=_dtype(config, rest),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=num_experts,
        top_k=integer(config, *family.top_k),
        moe_layers=tuple(layer for layer in layers if layer < num_layers),
        mtp_layers=tuple(layer for layer in layers if layer >= num_layers),
        ffn=shape.ffn,
        quantization=scheme.quantization if scheme else None,
    )
    return ConversionPlan(facts, _distinct((*assets, *dense, *experts)), tuple(notes))


def model_name(directory: Path) -> str:
    """What to call a model: its directory, or its repository where that is a snapshot in a Hugging Face cache."""
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.split("--")[-1]
    return resolved.name


def _refuse_dense(checkpoint: Checkpoint) -> None:
    model_type = checkpoint.config.get("model_type")
    if model_type not in REFUSED and not any(looks_like_expert(name) for name in checkpoint.tensors):
        raise UnsupportedModel(f"this {model_type} checkpoint has no expert tensors: a dense model")


def _check_layers(rest: Mapping[str, SourceTensor], moe_layers: list[int], num_layers: int) -> None:
    """Every decoder layer is there, and every layer with a router has its experts."""
    present = {layer for name in rest if (layer := layer_of(name, num_layers)) is not None}
    for layer in range(num_layers):
        if layer not in present:
            raise CheckpointError(f"no tensor of layer {layer}, though config.json says {num_layers} layers")
    for name in rest:
        if is_router(name) and layer_of(name, num_layers) not in moe_layers:
            raise CheckpointError(f"{name} is a router, but its layer has no experts")


def _dtype(config: Mapping[str, Any], rest: Mapping[str, SourceTensor]) -> str:
    """The dtype the checkpoint computes in: config.json's, else that of its largest floating tensor."""
    named = _DTYPE_NAMES.get(str(config.get("dtype", config.get("torch_dtype"))))
    floats = [tensor.span for tensor in rest.values() if tensor.span.dtype in _DTYPE_NAMES.values()]
    if named:
        return named
    if not floats:
        raise CheckpointError("config.json has no dtype, and no tensor outside the experts is floating point")
    return max(floats, key=lambda span: span.size).dtype


def _distinct(files: Iterable[PlannedFile]) -> tuple[PlannedFile, ...]:
    out = tuple(files)
    if len({file.file for file in out}) != len(out):
        raise CheckpointError("two parts of the checkpoint would be written to one file")
    return out
