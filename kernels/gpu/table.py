"""The experts of one layer as the kernels address them: one by one, through tables of addresses on the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, overload

import torch
from torch import Tensor

from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix

from .configuration import Matrix

_ALIGNMENT: Final = 16  # bytes; what the kernels promise the compiler
_PACKED: Final = (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
_PACKED_MULTIPLE: Final = 8  # columns; every packing puts 8 into a word
_GROUP_MULTIPLE: Final = 32  # columns; no tile is narrower


@dataclass(frozen=True, slots=True)
class MatrixForm:
    """What one projection of all experts of a layer has in common, so that one kernel can run them together."""

    format: WeightFormat
    shape: tuple[int, int]  # (N, K)
    transposed: bool  # [K, N] in memory
    stride: int  # elements of `data` from one row to the next, or of a transposed matrix from one column
    scale_stride: int
    block: tuple[int, int]
    data_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    has_zero: bool

    @classmethod
    def of(cls, matrix: WeightMatrix, bias: Tensor | None) -> MatrixForm:
        """Raises ValueError for what the kernels cannot read."""
        transposed, stride = _layout(matrix)
        scale, zero, group = matrix.scale, matrix.zero, matrix.block[1]
        if matrix.format in (*_PACKED, WeightFormat.FP8_BLOCK) and (not group or group % _GROUP_MULTIPLE):
            raise ValueError(f"{matrix.format.value} weights with groups of {group} columns, not a multiple of 32")
        if scale is not None and scale.ndim == 2 and scale.shape[1] > 1 and scale.stride(1) != 1:
            raise ValueError(f"scales with strides {scale.stride()}; the columns of a row must be neighbours")
        if zero is not None and (scale is None or zero.stride() != scale.stride()):
            raise ValueError("zero points must lie as their scales do")
        return cls(
            matrix.format, matrix.shape, transposed, stride, 0 if scale is None or scale.ndim < 2 else scale.stride(0),
            matrix.block, matrix.data.dtype, None if scale is None else scale.dtype,
            None if bias is None else bias.dtype, zero is not None,
        )  # fmt: skip

    def problem(self, element: int, *, gated: bool) -> Matrix:
        """As the choice of configuration sees it; `element` is the bytes of one input."""
        columns, inner = self.shape
        return Matrix(columns // 2 if gated else columns, inner, self.format, self.group, gated, element)

    @property
    def group(self) -> int:
        """Columns of a row that share a scale; 0 where none do or all."""
        return self.block[1] if self.format in (*_PACKED, WeightFormat.FP8_BLOCK) else 0


def _layout(matrix: WeightMatrix) -> tuple[bool, int]:
    """(transposed, stride) of the data."""
    data = matrix.data
    rows, columns = data.stride()
    if data.ndim != 2 or 1 not in (rows, columns):
        raise ValueError(f"a matrix with strides {data.stride()}; rows or columns must be contiguous")
    transposed = columns != 1
    if transposed and matrix.format in _PACKED:
        raise ValueError(f"{matrix.format.value} weights must not be transposed: two columns share a byte")
    if matrix.format in _PACKED and matrix.shape[1] % _PACKED_MULTIPLE:
        raise ValueError(f"{matrix.format.value} weights with {matrix.shape[1]} columns, not a multiple of 8")
    if data.data_ptr() % _ALIGNMENT:
        raise ValueError(f"weights at an address that is no multiple of {_ALIGNMENT} bytes; clone() them")
    return transposed, columns if transposed else rows


@dataclass(frozen=True, slots=True)
class LayerForm:
    """The form of both projections."""

    gate_up: MatrixForm
    down: MatrixForm

    @classmethod
    def of(cls, expert: ExpertMatrices) -> LayerForm:
        """Raises ValueError for what the kernels cannot read, and where the two do not fit each other."""
        form = cls(
            MatrixForm.of(expert.gate_up, expert.gate_up_bias), MatrixForm.of(expert.down, expert.down_bias)
        )  # fmt: skip
        (doubled, hidden), (outputs, inner) = form.gate_up.shape, form.down.shape
        if doubled != 2 * inner or outputs != hidden:
            raise ValueError(f"gate_up {form.gate_up.shape} and down {form.down.shape} are not [2I, H] and [H, I]")
        return form


class ExpertTable(Sequence[ExpertMatrices | None]):
    """One layer's experts on one device, each there or not. Keeps those that it has alive.

    Putting and removing an expert changes 12 numbers on the device, in the order of its current stream: work that was
    enqueued there before still sees the expert.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._experts: list[ExpertMatrices | None] = [None] * num_experts
        self._form: LayerForm | None = None
        self._present = 0
        # rows: data, scale, zero, bias; tiles.py names them
        self.gate_up = torch.zeros(4, num_experts, dtype=torch.int64, device=device)  # [4, E] addresses
        self.down = torch.zeros(4, num_experts, dtype=torch.int64, device=device)  # [4, E] addresses
        self._map = torch.full((num_experts,), -1, dtype=torch.int32, device=device)  # [E]

    @classmethod
    def of(cls, experts: Sequence[ExpertMatrices | None], device: torch.device) -> ExpertTable:
        """A table of these."""
        table = cls(len(experts), device)
        for index, expert in enumerate(experts):
            if expert is not None:
                table.put(index, expert)
        return table

    @property
    def form(self) -> LayerForm | None:
        """What its experts have in common; None as long as it never had one."""
        return self._form

    @property
    def expert_map(self) -> Tensor | None:
        """int32 [E] for `align_rows` and `combine`: each expert's own index, -1 for those not here. None: all are."""
        return None if self._present == len(self._experts) else self._map

    @property
    def present(self) -> int:
        """How many experts are here."""
        return self._present

    def put(self, index: int, expert: ExpertMatrices) -> None:
        """Add or replace one. Raises ValueError where it has another form than those before it, or another device."""
        form = LayerForm.of(expert)
        if self._form not in (None, form):
            raise ValueError(f"expert {index} has the form {form}, those before it {self._form}")
        parts = _parts(expert)
        if any(part is not None and part.device != self._map.device for half in parts for part in half):
            raise ValueError(f"expert {index} is not on {self._map.device}")
        self._form = form
        self._present += self._experts[index] is None
        self._experts[index] = expert
        for table, half in zip((self.gate_up, self.down), parts, strict=True):
            table[:, index] = torch.tensor([0 if part is None else part.data_ptr() for part in half])
        self._map[index] = index

    def remove(self, index: int) -> None:
        """Let go of one; it may be absent already."""
        self._present -= self._experts[index] is not None
        self._experts[index] = None
        self._map[index] = -1

    def __len__(self) -> int:
        return len(self._experts)

    @overload
    def __getitem__(self, index: int) -> ExpertMatrices | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ExpertMatrices | None]: ...
    def __getitem__(self, index: int | slice) -> ExpertMatrices | Sequence[ExpertMatrices | None] | None:
        return self._experts[index]

    def __iter__(self) -> Iterator[ExpertMatrices | None]:
        return iter(self._experts)


def _parts(expert: ExpertMatrices) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    gate_up, down = expert.gate_up, expert.down
    return (
        (gate_up.data, gate_up.scale, gate_up.zero, expert.gate_up_bias),
        (down.data, down.scale, down.zero, expert.down_bias),
    )
