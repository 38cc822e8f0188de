"""4-bit weights of the skeleton: found by the names of their tensors, checked, planned as floating point. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import QuantMethod
from moehive.protocol.safetensors_header import TensorSpec

from .layout import PackedWeight, Piece, Span
from .quantization import INT4, PER_WORD, Scheme, stored_weight
from .source import SourceTensor

_HEADS = ("weight_packed", "qweight")  # the tensors that hold the values
_TAILS = {
    "weight_packed": ("weight_scale", "weight_shape", "weight_zero_point"),
    "qweight": ("qzeros", "scales", "g_idx"),
}


def plan_packed(tensors: Mapping[str, SourceTensor], scheme: Scheme | None) -> tuple[dict[str, Piece], set[str]]:
    """Each 4-bit weight as a piece, by the name of the tensor of its values; and the names of all its tensors.

    Raises CheckpointError for tensors that do not fit each other or the scheme.
    """
    heads = [name for name in tensors if name.rpartition(".")[2] in _HEADS]
    if scheme is None or scheme.quantization.method not in INT4:
        if heads:
            raise CheckpointError(f"{heads[0]} holds packed values, but config.json does not say how")
        return {}, set()
    pieces = {name: _piece(name, tensors, scheme) for name in heads}
    taken = {_sibling(name, kind.name) for name, piece in pieces.items() for kind, _ in _packed(piece).parts}
    kinds = {kind for name in _HEADS for kind in _TAILS[name]}
    for name in tensors:
        if name.rpartition(".")[2] in kinds and name not in taken:
            raise CheckpointError(f"{name} belongs to a packed weight that the checkpoint does not hold")
    return pieces, taken


def _piece(name: str, tensors: Mapping[str, SourceTensor], scheme: Scheme) -> Piece:
    shape = _shape(name, tensors[name].span.shape, scheme.quantization.method)
    parts = []
    for kind, stored in stored_weight(shape, scheme, transposed=False).items():
        key = _sibling(name, kind)
        tensor = tensors.get(key)
        if tensor is None:
            raise CheckpointError(f"{key} is missing: {name} cannot be widened without it")
        found = tensor.span
        if found.shape != stored.shape or found.dtype not in stored.dtypes:
            raise CheckpointError(
                f"{key}: dtype {found.dtype} and shape {list(found.shape)}, expected are {' or '.join(stored.dtypes)} "
                f"and {list(stored.shape)}"
            )
        parts.append((TensorSpec(kind, found.dtype, found.shape), Span(tensor.file, found.offset, found.size)))
    dtype = next(spec.dtype for spec, _ in parts if spec.name in ("weight_scale", "scales"))
    spec = TensorSpec(_sibling(name, "weight"), dtype, shape)
    if spec.name in tensors:
        raise CheckpointError(f"{spec.name}: the checkpoint holds this weight and, in {name}, the same in 4 bits")
    return Piece(spec, parts[0][1], PackedWeight(scheme.quantization, tuple(parts)))


def _shape(name: str, words: tuple[int, ...], method: QuantMethod) -> tuple[int, int]:
    """[out, in] of a weight of whole words."""
    head = "weight_packed" if method is QuantMethod.INT4_PACKED else "qweight"
    if len(words) != 2 or not all(words) or name.rpartition(".")[2] != head:
        raise CheckpointError(f"{name}: a matrix {head} is expected, not {list(words)}")
    if method is QuantMethod.INT4_PACKED:
        return words[0], words[1] * PER_WORD
    if method is QuantMethod.INT4_AWQ:
        return words[1] * PER_WORD, words[0]
    return words[1], words[0] * PER_WORD


def _sibling(name: str, kind: str) -> str:
    """The tensor of another kind of the same weight."""
    return f"{name.rpartition('.')[0]}.{kind}"


def _packed(piece: Piece) -> PackedWeight:
    assert isinstance(piece.widening, PackedWeight)
    return piece.widening
