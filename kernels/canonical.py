"""From the tensors of one expert as they are stored to the weights that `expert_ffn` takes.

Owns the names under which the hub stores an expert. Copies only where the dtype changes or where gate and up do not lie
next to each other; never keeps a whole shard alive for the sake of a small tensor in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .dequantize import dequantize_fp8_block, dequantize_mxfp4
from .expert_ffn import ExpertWeights, FfnSpec

# (gate, up, down) as the hub's families call them
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")


def canonical_weights(
    tensors: Mapping[str, Tensor], spec: FfnSpec, dtype: torch.dtype, *, fp8_block: tuple[int, int] | None = None
) -> ExpertWeights:
    """The weights of one expert, of `dtype`.

    `tensors` has one expert's tensors under their short names: `gate_proj.weight`, `up_proj.weight`, `down_proj.weight`
    (or w1, w3, w2), each with an optional `.bias` and, for FP8 in blocks of `fp8_block`, `.weight_scale_inv`; or fused
    `gate_up_proj`, `down_proj`, each with an optional `_bias`, or as `_blocks` and `_scales` (MXFP4).

    Weights already of `dtype` are views of the given tensors; gate and up become one view when they lie next to each
    other. Raises ValueError for missing, unknown or misshapen tensors.
    """
    source = _Source(tensors, dtype, fp8_block)
    if any(name.startswith("gate_up_proj") for name in tensors):
        weights = _from_fused(source)
    else:
        weights = _from_projections(source, spec)
    source.done()
    _check_shapes(weights, spec)
    return _without_leftovers(weights, tensors)


class _Source:
    """Takes tensors out of a mapping by name, and complains about what nobody took."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, fp8_block: tuple[int, int] | None) -> None:
        self._rest = dict(tensors)
        self._names = sorted(tensors)
        self.dtype = dtype
        self.fp8_block = fp8_block

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str) -> Tensor:
        if name not in self._rest:
            raise ValueError(f"tensor {name!r} is missing from an expert that has {self._names}")
        return self._rest.pop(name)

    def take_optional(self, name: str) -> Tensor | None:
        return self._rest.pop(name).to(self.dtype) if name in self._rest else None

    def done(self) -> None:
        if self._rest:
            raise ValueError(f"unknown tensors in an expert: {sorted(self._rest)}")


def _from_fused(source: _Source) -> ExpertWeights:
    gate_up, down = (_fused_weight(source, name) for name in _FUSED)
    return ExpertWeights(gate_up, down, *(source.take_optional(f"{name}_bias") for name in _FUSED))


def _fused_weight(source: _Source, name: str) -> Tensor:
    if source.has(f"{name}_blocks"):
        return dequantize_mxfp4(source.take(f"{name}_blocks"), source.take(f"{name}_scales"), source.dtype)
    return source.take(name).to(source.dtype)


def _from_projections(source: _Source, spec: FfnSpec) -> ExpertWeights:
    if spec.transposed:
        raise ValueError("separate gate and up projections are stored [out, in]; the model's experts are transposed")
    gate, up, down = next((names for names in _PROJECTIONS if source.has(f"{names[0]}.weight")), _PROJECTIONS[0])
    gate_up = _join_weights(source, gate, up)
    biases = [source.take_optional(f"{name}.bias") for name in (gate, up, down)]
    if len({bias is None for bias in biases}) != 1:
        raise ValueError("some projections of an expert have a bias and some do not")
    gate_bias, up_bias, down_bias = biases
    gate_up_bias = torch.cat((gate_bias, up_bias)) if gate_bias is not None and up_bias is not None else None
    return ExpertWeights(gate_up, _plain_weight(source, down), gate_up_bias, down_bias)


def _plain_weight(source: _Source, name: str) -> Tensor:
    weight, scale = source.take(f"{name}.weight"), _scale(source, name)
    return weight.to(source.dtype) if scale is None else _from_fp8(source, weight, scale, None)


def _join_weights(source: _Source, gate_name: str, up_name: str) -> Tensor:
    """[gate; up] as [2I, H]: a view where they are neighbours of the right dtype, else one new tensor."""
    parts = [(source.take(f"{name}.weight"), _scale(source, name)) for name in (gate_name, up_name)]
    gate, up = parts[0][0], parts[1][0]
    if gate.ndim != 2 or gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} are not two matrices of one shape")
    if gate.dtype == up.dtype == source.dtype and _adjacent(gate, up):
        rows, columns = gate.shape
        return gate.as_strided((2 * rows, columns), (columns, 1))  # [2I, H]
    joined = torch.empty(2 * gate.shape[0], gate.shape[1], dtype=source.dtype, device=gate.device)  # [2I, H]
    for (weight, scale), half in zip(parts, joined.chunk(2), strict=True):
        if scale is None:
            half.copy_(weight)
        else:
            _from_fp8(source, weight, scale, half)
    return joined


def _adjacent(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins where `first` ends, in the same memory."""
    return (
        first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + first.numel()
    )


def _scale(source: _Source, name: str) -> Tensor | None:
    return source.take(f"{name}.weight_scale_inv") if source.has(f"{name}.weight_scale_inv") else None


def _from_fp8(source: _Source, weight: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    if source.fp8_block is None:
        raise ValueError("an expert has FP8 block scales, but the model's block size was not given")
    return dequantize_fp8_block(weight, scale, source.fp8_block, source.dtype, out=out)


def _check_shapes(weights: ExpertWeights, spec: FfnSpec) -> None:
    if weights.gate_up.ndim != 2 or weights.down.ndim != 2:
        raise ValueError(
            f"gate_up {tuple(weights.gate_up.shape)} and down {tuple(weights.down.shape)} are not matrices"
        )
    gate_up, down = (t.t() if spec.transposed else t for t in (weights.gate_up, weights.down))  # [2I, H], [H, I]
    doubled, hidden = gate_up.shape
    if tuple(down.shape) != (hidden, doubled // 2) or doubled % 2:
        raise ValueError(
            f"gate_up {tuple(weights.gate_up.shape)} and down {tuple(weights.down.shape)} do not fit each other "
            f"({'[in, out]' if spec.transposed else '[out, in]'})"
        )
    for bias, size in ((weights.gate_up_bias, doubled), (weights.down_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"bias {tuple(bias.shape)} where [{size}] is needed")
    if not all(tensor.is_floating_point() for tensor in weights.tensors):
        raise ValueError("an expert's weights are not floating point")


def _without_leftovers(weights: ExpertWeights, tensors: Mapping[str, Tensor]) -> ExpertWeights:
    """Views stay only if all weights are views: one small bias must not keep a converted shard in memory."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}

    def is_view(tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in owned

    if all(is_view(tensor) for tensor in weights.tensors):
        return weights

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if is_view(tensor) else tensor

    biases = (None if bias is None else own(bias) for bias in (weights.gate_up_bias, weights.down_bias))
    return ExpertWeights(own(weights.gate_up), own(weights.down), *biases)
