"""The experts of a checkpoint: gathered from its tensor names, checked against its config, one output file each.

Pure: no file is opened. What does not fit exactly (a missing expert, a shape that differs, an unknown kind of tensor)
is refused with the tensor's name; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moehive.protocol.errors import CheckpointError, UnsupportedModel
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ExpertFfn, ShardType
from moehive.protocol.safetensors_header import TensorSpec

from .layout import MTP_GROUP, Piece, PlannedFile, Span, tensor_file
from .names import ExpertTensor, Role, layer_of, parse_expert
from .quantization import FLOATS, INT4, Scheme, Stored, stored_weight
from .source import SourceTensor

# Kinds of tensors in the order in which they lie in a file.
_KIND_ORDER = {
    "weight": 0, "blocks": 0, "weight_packed": 0, "qweight": 0, "weight_scale_inv": 1, "weight_scale": 1, "scales": 1,
    "weight_zero_point": 2, "qzeros": 2, "bias": 3, "weight_shape": 4, "g_idx": 4,
}  # fmt: skip
_ROLE_ORDER = {role: index for index, role in enumerate(Role)}

Part = tuple[Role, str]  # role and kind
Parts = dict[Part, Piece]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What every expert of the model must look like."""

    hidden_size: int
    intermediate_size: int
    ffn: ExpertFfn
    scheme: Scheme | None

    def parts(self, *, fused: bool, plain: bool) -> dict[Part, Stored]:
        """The tensors of one expert; `plain`: of one that is not quantised."""
        H, I = self.hidden_size, self.intermediate_size  # noqa: E741 - the literature's name
        first = {Role.GATE_UP: (2 * I, H)} if fused else {Role.GATE: (I, H), Role.UP: (I, H)}
        out: dict[Part, Stored] = {}
        for role, shape in {**first, Role.DOWN: (H, I)}.items():
            weight = stored_weight(shape, None if plain else self.scheme, transposed=self.ffn.transposed)
            out.update({(role, kind): stored for kind, stored in weight.items()})
            if self.ffn.bias:
                out[role, "bias"] = Stored(shape[:1], FLOATS)
        return out


def plan_experts(
    tensors: Mapping[str, SourceTensor], shape: ExpertShape, num_experts: int, num_layers: int
) -> tuple[PlannedFile, ...]:
    """One file per expert, by layer and expert. Raises CheckpointError, UnsupportedModel."""
    experts: dict[ExpertKey, Parts] = {}
    for name, tensor in tensors.items():
        parsed = parse_expert(name)
        if parsed is None:
            raise UnsupportedModel(f"{name} lies among the experts, but moehive has no rule for it")
        layer = layer_of(name, num_layers)
        if layer is None:
            raise UnsupportedModel(f"{name}: no decoder layer in the name of an expert's tensor")
        for expert, piece in _pieces(name, parsed, tensor, num_experts):
            parts = experts.setdefault(ExpertKey(layer, expert), {})
            if parts.setdefault((parsed.role, parsed.kind), piece) is not piece:
                raise CheckpointError(f"{name}: expert {layer}_{expert} has two tensors of this kind")
    _check_complete(experts, num_experts)
    _check_alike(experts, shape)
    return tuple(_file(key, parts, num_layers) for key, parts in sorted(experts.items()))


def _pieces(name: str, parsed: ExpertTensor, tensor: SourceTensor, num_experts: int) -> Iterator[tuple[int, Piece]]:
    """The tensor as one piece, or, of a fused tensor [E, ...], one slice per expert."""
    span = tensor.span
    if parsed.expert is not None:
        spec = TensorSpec(name, span.dtype, span.shape)
        yield parsed.expert, Piece(spec, Span(tensor.file, span.offset, span.size))
        return
    if not span.shape or span.shape[0] != num_experts:
        raise CheckpointError(f"{name}: shape {list(span.shape)}, but config.json says {num_experts} experts")
    size = span.size // num_experts
    for expert in range(num_experts):
        spec = TensorSpec(parsed.name_of(expert), span.dtype, span.shape[1:])
        yield expert, Piece(spec, Span(tensor.file, span.offset + expert * size, size))


def _check_complete(experts: Mapping[ExpertKey, Parts], num_experts: int) -> None:
    layers = {key.layer for key in experts}
    odd = {ExpertKey(layer, expert) for layer in layers for expert in range(num_experts)} ^ set(experts)
    if odd:
        key = min(odd)
        state = "is too many" if key in experts else "is missing"
        raise CheckpointError(f"layer {key.layer}: expert {key.expert} {state}; config.json says {num_experts} experts")


def _check_alike(experts: Mapping[ExpertKey, Parts], shape: ExpertShape) -> None:
    dtypes: dict[Part, str] = {}
    plain = {key for key, parts in experts.items() if _is_plain(parts, shape)}
    if len(plain) == len(experts):
        plain.clear()  # then config.json is wrong
    for key, parts in sorted(experts.items()):
        expected = shape.parts(fused=any(role is Role.GATE_UP for role, _ in parts), plain=key in plain)
        odd = set(parts) ^ set(expected)
        if odd:
            _refuse_part(key, min(odd, key=_least_expected), parts, shape)
        for part, piece in parts.items():
            spec, stored = piece.spec, expected[part]
            if spec.shape != stored.shape:
                raise CheckpointError(f"{spec.name}: shape {list(spec.shape)}, expected is {list(stored.shape)}")
            if spec.dtype not in stored.dtypes:
                wanted = ", ".join(stored.dtypes)
                raise CheckpointError(f"{spec.name}: dtype {spec.dtype}, one of {wanted} is expected")
            if dtypes.setdefault(part, spec.dtype) != spec.dtype:
                raise CheckpointError(f"{spec.name}: dtype {spec.dtype}, other experts have {dtypes[part]}")


def _is_plain(parts: Parts, shape: ExpertShape) -> bool:
    """Whether an expert was left out where others have 4 bits: publishers do so with the first or last layers."""
    may_be = shape.scheme is not None and shape.scheme.quantization.method in INT4
    return may_be and {kind for _, kind in parts} <= {"weight", "bias"}


def _least_expected(part: Part) -> tuple[bool, str, int]:
    """Order of complaints: a kind that nobody knows says more than what is missing in its place."""
    return part[1] in _KIND_ORDER, part[1], _ROLE_ORDER[part[0]]


def _refuse_part(key: ExpertKey, part: Part, parts: Parts, shape: ExpertShape) -> None:
    role, kind = part
    if part not in parts:
        raise CheckpointError(f"layer {key.layer}, expert {key.expert}: the {kind} of {role.value} is missing")
    name = parts[part].spec.name
    if kind in _KIND_ORDER:
        method = shape.scheme.quantization.method if shape.scheme else "none"
        raise CheckpointError(f"{name} does not fit the config.json (quantization: {method}, biases: {shape.ffn.bias})")
    raise UnsupportedModel(f"{name}: tensors of kind {kind!r} are not supported")


def _file(key: ExpertKey, parts: Parts, num_layers: int) -> PlannedFile:
    ordered = sorted(parts.items(), key=lambda item: (_KIND_ORDER[item[0][1]], _ROLE_ORDER[item[0][0]]))
    return tensor_file(
        f"experts/{key.layer:05d}/{key.expert:05d}.safetensors",
        ShardType.EXPERT,
        [piece for _, piece in ordered],
        expert_key=key,
        group=MTP_GROUP if key.layer >= num_layers else None,
    )
