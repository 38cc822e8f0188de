"""The skeleton of a checkpoint: everything but routed experts, in files of bounded size. Pure: no file is opened.

A model has one quantizer, and that is ours; so fp8 weights outside the experts become bf16 here (transformers does the
same on load, but takes the block size from the grid of scales, which is wrong for ragged blocks), and 4-bit weights get
the dtype of their scales, in which compressed-tensors and the kernels of AWQ and GPTQ widen them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import QuantMethod, ShardType
from moehive.protocol.safetensors_header import TensorSpec

from .layout import MTP_GROUP, BlockScale, Piece, PlannedFile, Span, tensor_file
from .names import is_mtp, is_shared
from .packed import plan_packed
from .quantization import Scheme, scale_shape
from .source import SourceTensor

MAX_DENSE_FILE = 256 << 20  # bytes of tensors in one file; a larger tensor gets a file of its own
_SCALE = "_scale_inv"
_FP8 = ("F8_E4M3", "F8_E5M2")


def plan_dense(tensors: Mapping[str, SourceTensor], scheme: Scheme | None, num_layers: int) -> tuple[PlannedFile, ...]:
    """Dense files, then shared-expert files, then those of multi-token prediction. Raises as `plan_conversion`."""
    pieces = _pieces(tensors, scheme)
    groups: dict[str, list[Piece]] = {"dense": [], "shared": [], "mtp": []}
    for piece in pieces:
        name = piece.spec.name
        groups["mtp" if is_mtp(name, num_layers) else "shared" if is_shared(name) else "dense"].append(piece)
    return (
        *_files("model", ShardType.DENSE, groups["dense"]),
        *_files("shared", ShardType.SHARED, groups["shared"]),
        # outside the index and outside the pattern model*.safetensors: transformers does not load them with the model
        *_files("mtp", ShardType.DENSE, groups["mtp"], group=MTP_GROUP),
    )


def _pieces(tensors: Mapping[str, SourceTensor], scheme: Scheme | None) -> list[Piece]:
    """In the order of the source's files, so that they are read front to back."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].span.offset))
    fp8 = scheme is not None and scheme.quantization.method is QuantMethod.FP8_BLOCK
    block = scheme.quantization.block if scheme and fp8 else None
    packed, consumed = plan_packed(tensors, scheme)
    pieces: list[Piece] = []
    for name, tensor in ordered:
        if name in consumed:
            pieces += [packed[name]] if name in packed else []
            continue
        if block and name.endswith(_SCALE):
            if name.removesuffix(_SCALE) not in tensors:
                raise CheckpointError(f"{name} scales a weight that the checkpoint does not hold")
            continue
        if tensor.span.dtype in _FP8:
            pieces.append(_dequantized(name, tensor, tensors.get(name + _SCALE), block))
        else:
            pieces.append(Piece(TensorSpec(name, tensor.span.dtype, tensor.span.shape), _span(tensor)))
    return pieces


def _dequantized(name: str, tensor: SourceTensor, scale: SourceTensor | None, block: tuple[int, int] | None) -> Piece:
    shape = tensor.span.shape
    if block is None or scale is None:
        raise CheckpointError(f"{name} is fp8, but it has no scales, or config.json has no weight_block_size")
    if tensor.span.dtype != "F8_E4M3" or len(shape) != 2:
        raise CheckpointError(f"{name}: an F8_E4M3 matrix is expected, not {tensor.span.dtype} {list(shape)}")
    found, expected = (scale.span.dtype, scale.span.shape), ("F32", scale_shape(shape, block))
    if found != expected:
        raise CheckpointError(f"{name}{_SCALE}: dtype and shape are {found}, expected are {expected}")
    return Piece(TensorSpec(name, "BF16", shape), _span(tensor), BlockScale(_span(scale), block))


def _span(tensor: SourceTensor) -> Span:
    return Span(tensor.file, tensor.span.offset, tensor.span.size)


def _files(stem: str, kind: ShardType, pieces: Sequence[Piece], group: str | None = None) -> list[PlannedFile]:
    parts: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not parts or filled + piece.spec.size > MAX_DENSE_FILE:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += piece.spec.size
    names = [f"{stem}-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    return [tensor_file(name, kind, part, group=group) for name, part in zip(names, parts, strict=True)]
