"""How an expert lies in a slot of an accelerator's memory: as it is computed with, or as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final, Protocol

import torch
from torch import Tensor

from moehive.kernels.canonical import widened
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix
from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ModelFacts

from .loader import ExpertLoader, spec_of
from .tier import WeightsTier

_ALIGNMENT: Final = 256  # bytes: a GPU's allocator's own


class SlotLayout(Protocol):
    """Where one expert's tensors lie in a slot. `dtype` is that of the computation."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""

    @property
    def nbytes(self) -> int:
        """Of a slot."""

    @property
    def forms(self) -> Sequence[ExpertMatrices]:
        """The forms that experts have in a slot, without their values."""

    def form_of(self, key: ExpertKey) -> int:
        """Which of `forms` an expert has. In a slot, all of one form lie at the same addresses."""

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """Write an expert from `ram` to host memory, uint8 [nbytes]. Raises ManifestError for one unlike its form."""

    def weights(self, form: int, memory: Tensor) -> ExpertWeights:
        """What torch computes with, of `dtype`, for a slot uint8 [nbytes] with an expert of that form."""

    def matrices(self, form: int, memory: Tensor) -> ExpertMatrices:
        """What the kernels compute with: views of a slot uint8 [nbytes]."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Tensors behind each other, each at a multiple of 256 bytes."""

    kinds: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Parts:
        """Of the dtypes and shapes of these."""
        return cls(tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors))

    @property
    def nbytes(self) -> int:
        """Of all."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        exact = (prod(shape) * dtype.itemsize for dtype, shape in self.kinds)
        return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in exact]

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in `memory`, uint8 [nbytes]."""
        parts = torch.split(memory, self._sizes)
        return [
            part[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for part, (dtype, shape) in zip(parts, self.kinds, strict=True)
        ]

    def write(self, tensors: Sequence[Tensor], memory: Tensor) -> None:
        """Copy tensors to `memory`, uint8 [nbytes]. Raises ManifestError for others: nothing is rounded or cut."""
        found = Parts.of(tensors)
        if found != self:
            raise ManifestError(f"an expert has the tensors {found.kinds}, others of the model {self.kinds}")
        for target, source in zip(self.views(memory), tensors, strict=True):
            target.copy_(source)


class ExpertLayout:
    """An expert as it is computed with: gate_up, down and the biases, where there are any."""

    def __init__(self, dtype: torch.dtype, spec: FfnSpec, parts: Parts) -> None:
        self.dtype = dtype
        self._spec = spec
        self._parts = parts

    @classmethod
    def of(cls, model: ModelFacts, dtype: torch.dtype) -> ExpertLayout:
        """Of all experts of a model; they have one shape, and in `dtype` one form, however they are stored."""
        inner, hidden = model.intermediate_size, model.hidden_size
        gate_up, down = (2 * inner, hidden), (hidden, inner)
        matrices = (gate_up[::-1], down[::-1]) if model.ffn.transposed else (gate_up, down)
        shapes = (*matrices, (2 * inner,), (hidden,)) if model.ffn.bias else matrices
        return cls(dtype, spec_of(model.ffn), Parts(tuple((dtype, shape) for shape in shapes)))

    @property
    def nbytes(self) -> int:
        """See SlotLayout."""
        return self._parts.nbytes

    @property
    def forms(self) -> Sequence[ExpertMatrices]:
        """See SlotLayout."""
        return [self.matrices(0, torch.empty(self.nbytes, dtype=torch.uint8, device="meta"))]

    def form_of(self, key: ExpertKey) -> int:
        """See SlotLayout."""
        return 0

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """See SlotLayout."""
        with ram.lease((key, self.dtype)) as weights:
            self._parts.write(weights.tensors, memory)
            del weights  # they are not counted after their lease

    def weights(self, form: int, memory: Tensor) -> ExpertWeights:
        """See SlotLayout. Views."""
        return ExpertWeights(*self._parts.views(memory))

    def matrices(self, form: int, memory: Tensor) -> ExpertMatrices:
        """See SlotLayout."""
        return self.weights(form, memory).matrices(self._spec)


class StoredLayout:
    """An expert as it is stored: a half to a quarter of the bytes of a quantised one.

    Where experts are stored in several forms, a slot has room for the largest, and each is as its own form says.
    """

    def __init__(self, dtype: torch.dtype, spec: FfnSpec, forms: Mapping[ExpertKey, ExpertMatrices]) -> None:
        self.dtype = dtype
        self._spec = spec
        self.forms: Sequence[ExpertMatrices] = list({id(form): form for form in forms.values()}.values())
        numbers = {id(form): number for number, form in enumerate(self.forms)}
        self._form_of = {key: numbers[id(form)] for key, form in forms.items()}
        self._parts = [Parts.of(_present(form)) for form in self.forms]

    @classmethod
    def of(cls, loader: ExpertLoader, dtype: torch.dtype) -> StoredLayout | None:
        """Of all experts of a model; None where none is quantised, or some is in floating point but not of `dtype`."""
        layout = cls(dtype, loader.spec, loader.forms)
        matrices = [matrix for form in layout.forms for matrix in (form.gate_up, form.down)]
        plain = [matrix.data.dtype for matrix in matrices if matrix.format is WeightFormat.PLAIN]
        return layout if len(plain) < len(matrices) and all(found == dtype for found in plain) else None

    @property
    def nbytes(self) -> int:
        """See SlotLayout."""
        return max(parts.nbytes for parts in self._parts)

    def form_of(self, key: ExpertKey) -> int:
        """See SlotLayout."""
        return self._form_of[key]

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """See SlotLayout."""
        parts = self._parts[self._form_of[key]]
        with ram.as_stored(key) as matrices:
            parts.write(_present(matrices), memory[: parts.nbytes])
            del matrices  # they are not counted after their lease

    def weights(self, form: int, memory: Tensor) -> ExpertWeights:
        """See SlotLayout. New tensors, with the values that the processor computes with; views of what has them."""
        return widened(self.matrices(form, memory), self._spec, self.dtype)

    def matrices(self, form: int, memory: Tensor) -> ExpertMatrices:
        """See SlotLayout."""
        stored, parts = self.forms[form], self._parts[form]
        views = iter(parts.views(memory[: parts.nbytes]))
        fields = [None if part is None else next(views) for part in _fields(stored)]
        gate_up, down = (
            WeightMatrix(matrix.format, data, scale, zero, matrix.block)
            for matrix, (data, scale, zero) in (
                (stored.gate_up, fields[:3]),
                (stored.down, fields[3:6]),
            )
            if data is not None
        )
        return ExpertMatrices(gate_up, down, *fields[6:])


def _fields(expert: ExpertMatrices) -> list[Tensor | None]:
    gate_up, down = expert.gate_up, expert.down
    return [
        gate_up.data, gate_up.scale, gate_up.zero, down.data, down.scale, down.zero,
        expert.gate_up_bias, expert.down_bias,
    ]  # fmt: skip


def _present(expert: ExpertMatrices) -> list[Tensor]:
    return [part for part in _fields(expert) if part is not None]
