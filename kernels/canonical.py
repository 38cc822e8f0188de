"""From the tensors of one expert as they are stored to what computes with them.

Two forms: `canonical_weights` in floating point, `stored_matrices` in the format of the checkpoint. Owns the names
under which the hub stores an expert. Copies only where the dtype changes or where gate and up do not lie next to each
other; never keeps a whole shard alive for the sake of a small tensor in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .dequantize import dequantize
from .expert_ffn import ExpertWeights, FfnSpec
from .formats import ExpertMatrices, WeightFormat, WeightMatrix
from .packings import compressed_tensors_matrix, fp8_block_matrix, mxfp4_matrix

# (gate, up, down) as the hub's families call them
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")

Block = tuple[int, int]
Empty = Callable[[tuple[int, ...]], Tensor]  # an uninitialised tensor of that shape, of the dtype that is asked for


def canonical_weights(
    tensors: Mapping[str, Tensor],
    spec: FfnSpec,
    dtype: torch.dtype,
    *,
    block: Block | None = None,
    empty: Empty | None = None,
) -> ExpertWeights:
    """The weights of one expert, of `dtype`; quantised ones are widened.

    `tensors` has one expert's tensors under their short names: `gate_proj.weight`, `up_proj.weight`, `down_proj.weight`
    (or w1, w3, w2), each with an optional `.bias`; with `.weight_scale_inv` for FP8 in blocks; or instead of `.weight`
    `.weight_packed`, `.weight_scale`, `.weight_shape` and an optional `.weight_zero_point` (INT4 of
    compressed-tensors). Or fused `gate_up_proj`, `down_proj`, each with an optional `_bias`, or as `_blocks` and
    `_scales` (MXFP4). `block` has the rows and columns that share a scale, for FP8 and INT4. `empty` makes the matrices
    that are no views, of `dtype`.

    Weights already of `dtype` are views of the given tensors; gate and up become one view when they lie next to each
    other. Raises ValueError for missing, unknown or misshapen tensors.
    """
    source = _Source(tensors, block)
    make = partial(torch.empty, dtype=dtype) if empty is None else empty
    if source.fused:
        gate_up, down = (_widened(_fused_matrix(source, name, spec), spec, dtype, make) for name in _FUSED)
        biases = [source.take_optional(f"{name}_bias") for name in _FUSED]
    else:
        gate, up, projection = source.projections(spec)
        gate_up = _join_widened(gate, up, dtype, make)
        down, biases = _widened(projection, spec, dtype, make), source.projection_biases()
    source.done()
    weights = ExpertWeights(gate_up, down, *(None if bias is None else bias.to(dtype) for bias in biases))
    weights.matrices(spec)  # raises for shapes that do not fit each other
    return _without_leftovers(weights, tensors)


def stored_matrices(tensors: Mapping[str, Tensor], spec: FfnSpec, *, block: Block | None = None) -> ExpertMatrices:
    """The expert as it is stored, quantised or not: what `canonical_weights` takes, values unchanged.

    Views of the given tensors where gate and up lie next to each other or are fused. Raises ValueError for missing,
    unknown or misshapen tensors.
    """
    source = _Source(tensors, block)
    if source.fused:
        gate_up, down = (_fused_matrix(source, name, spec) for name in _FUSED)
        biases = [source.take_optional(f"{name}_bias") for name in _FUSED]
    else:
        gate, up, down = source.projections(spec)
        gate_up, biases = _join_stored(gate, up), source.projection_biases()
    source.done()
    return ExpertMatrices(gate_up, down, *biases)


class _Source:
    """Takes tensors out of a mapping by name, and complains about what nobody took."""

    def __init__(self, tensors: Mapping[str, Tensor], block: Block | None) -> None:
        self._rest = dict(tensors)
        self._names = sorted(tensors)
        self._block = block
        self.fused = any(name.startswith(_FUSED[0]) for name in tensors)

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str) -> Tensor:
        if name not in self._rest:
            raise ValueError(f"tensor {name!r} is missing from an expert that has {self._names}")
        return self._rest.pop(name)

    def take_optional(self, name: str) -> Tensor | None:
        return self._rest.pop(name, None)

    def block(self, what: str) -> Block:
        if self._block is None:
            raise ValueError(f"an expert has {what}, but the model's block size was not given")
        return self._block

    def done(self) -> None:
        if self._rest:
            raise ValueError(f"unknown tensors in an expert: {sorted(self._rest)}")

    def projections(self, spec: FfnSpec) -> tuple[WeightMatrix, WeightMatrix, WeightMatrix]:
        """Gate, up and down of an expert that has them apart."""
        if spec.transposed:
            raise ValueError("gate and up projections apart are stored [out, in]; the model's experts are transposed")
        self._projection_names = next(
            (names for names in _PROJECTIONS if any(name.startswith(f"{names[0]}.") for name in self._rest)),
            _PROJECTIONS[0],
        )
        gate, up, down = (_projection(self, name) for name in self._projection_names)
        if gate.shape != up.shape or gate.format is not up.format:
            raise ValueError(f"gate {gate.shape} and up {up.shape} are not two matrices of one shape")
        return gate, up, down

    def projection_biases(self) -> list[Tensor | None]:
        """[gate_up, down], after `projections`."""
        gate, up, down = (self.take_optional(f"{name}.bias") for name in self._projection_names)
        if len({bias is None for bias in (gate, up, down)}) != 1:
            raise ValueError("some projections of an expert have a bias and some do not")
        return [torch.cat((gate, up)) if gate is not None and up is not None else None, down]


def _projection(source: _Source, name: str) -> WeightMatrix:
    """One projection [out, in] by the hub's name for it."""
    if source.has(f"{name}.weight_packed"):
        rows, columns = _sides(source.take(f"{name}.weight_shape"), name)
        height, width = source.block("packed 4-bit weights")
        packed, scale = source.take(f"{name}.weight_packed"), source.take(f"{name}.weight_scale")
        zero = source.take_optional(f"{name}.weight_zero_point")
        if packed.ndim != 2 or packed.shape[0] != rows or height != 1:
            raise ValueError(f"{name}.weight_packed {tuple(packed.shape)} of a weight [{rows}, {columns}]")
        return compressed_tensors_matrix(packed, scale, columns, width, zero)
    weight, scale_inv = source.take(f"{name}.weight"), source.take_optional(f"{name}.weight_scale_inv")
    if scale_inv is None:
        return _plain(weight)
    return fp8_block_matrix(weight, scale_inv, source.block("FP8 block scales"))


def _sides(shape: Tensor, name: str) -> tuple[int, int]:
    if shape.shape != (2,) or shape.is_floating_point():
        raise ValueError(f"{name}.weight_shape is {shape.dtype} {tuple(shape.shape)}, not two integers")
    rows, columns = shape.tolist()
    return rows, columns


def _plain(weight: Tensor) -> WeightMatrix:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weights {weight.dtype} {tuple(weight.shape)} are not matrices of floating point")
    return WeightMatrix(WeightFormat.PLAIN, weight)


def _fused_matrix(source: _Source, name: str, spec: FfnSpec) -> WeightMatrix:
    """A fused projection with its rows as outputs, whichever way round it is stored."""
    if source.has(f"{name}_blocks"):
        return mxfp4_matrix(source.take(f"{name}_blocks"), source.take(f"{name}_scales"))
    matrix = _plain(source.take(name))
    return replace(matrix, data=matrix.data.t()) if spec.transposed else matrix


def widened(expert: ExpertMatrices, spec: FfnSpec, dtype: torch.dtype) -> ExpertWeights:
    """An expert as it is stored in the form that is computed with, on its device: as `canonical_weights` makes it."""
    make = partial(torch.empty, dtype=dtype, device=expert.down.data.device)
    gate_up, down = (_widened(matrix, spec, dtype, make) for matrix in (expert.gate_up, expert.down))
    biases = (None if bias is None else bias.to(dtype) for bias in (expert.gate_up_bias, expert.down_bias))
    return ExpertWeights(gate_up, down, *biases)


def _widened(matrix: WeightMatrix, spec: FfnSpec, dtype: torch.dtype, empty: Empty) -> Tensor:
    """In the orientation that is computed with: transformers transposes what it widens, too."""
    if matrix.data.dtype == dtype:
        return matrix.data.t() if spec.transposed else matrix.data
    if spec.transposed:
        out = empty(matrix.shape[::-1])  # [K, N]
        dequantize(matrix, dtype, out=out.t())
        return out
    return dequantize(matrix, dtype, out=empty(matrix.shape))


def _join_widened(gate: WeightMatrix, up: WeightMatrix, dtype: torch.dtype, empty: Empty) -> Tensor:
    """[gate; up] as [2I, H]: a view where they are neighbours of the right dtype, else one new tensor."""
    if gate.data.dtype == up.data.dtype == dtype and (view := _neighbours(gate.data, up.data)) is not None:
        return view
    rows, columns = gate.shape
    joined = empty((2 * rows, columns))  # [2I, H]
    for matrix, half in zip((gate, up), joined.chunk(2), strict=True):
        dequantize(matrix, dtype, out=half)
    return joined


def _join_stored(gate: WeightMatrix, up: WeightMatrix) -> WeightMatrix:
    """[gate; up] in their format. Blocks that do not end with gate's last row become lower: scales are repeated."""
    block = gate.block
    if gate.format is WeightFormat.FP8_BLOCK:
        block = math.gcd(gate.shape[0], block[0]), block[1]
    parts = zip(*(_stored_parts(matrix, block) for matrix in (gate, up)), strict=True)
    data, scale, zero = (_join(*pair) for pair in parts)
    assert data is not None
    return WeightMatrix(gate.format, data, scale, zero, block)


def _stored_parts(matrix: WeightMatrix, block: Block) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    scale = matrix.scale
    if scale is not None and block[0] != matrix.block[0]:
        scale = scale.repeat_interleave(matrix.block[0] // block[0], 0)[: matrix.shape[0] // block[0]]
    return matrix.data, scale, matrix.zero


def _join(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        if first is not second:
            raise ValueError("one of gate and up has zero points and the other has none")
        return None
    view = _neighbours(first, second)
    return torch.cat((first, second)) if view is None else view


def _neighbours(first: Tensor, second: Tensor) -> Tensor | None:
    """Two matrices as one view, where the second begins where the first ends, in the same memory."""
    if not (
        first.ndim == 2
        and first.dtype == second.dtype
        and first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + first.numel()
    ):
        return None
    rows, columns = first.shape
    return first.as_strided((rows + second.shape[0], columns), (columns, 1))


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
