"""How an expert lies in a slot of an accelerator's memory: as it is computed with, or as it is stored."""

from __future__ import annotations

from collections.abc import Sequence
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

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """Write an expert from `ram` to host memory, uint8 [nbytes]. Raises ManifestError for one unlike others."""

    def weights(self, memory: Tensor) -> ExpertWeights:
        """What torch computes with, of `dtype`, for a slot uint8 [nbytes]."""

    def matrices(self, memory: Tensor) -> ExpertMatrices:
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
        """Of all experts of a model; they have one shape."""
        inner, hidden = model.intermediate_size, model.hidden_size
        gate_up, down = (2 * inner, hidden), (hidden, inner)
        matrices = (gate_up[::-1], down[::-1]) if model.ffn.transposed else (gate_up, down)
        shapes = (*matrices, (2 * inner,), (hidden,)) if model.ffn.bias else matrices
        return cls(dtype, spec_of(model.ffn), Parts(tuple((dtype, shape) for shape in shapes)))

    @property
    def nbytes(self) -> int:
        """See SlotLayout."""
        return self._parts.nbytes

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """See SlotLayout."""
        with ram.lease((key, self.dtype)) as weights:
            self._parts.write(weights.tensors, memory)

    def weights(self, memory: Tensor) -> ExpertWeights:
        """See SlotLayout. Views."""
        return ExpertWeights(*self._parts.views(memory))

    def matrices(self, memory: Tensor) -> ExpertMatrices:
        """See SlotLayout."""
        return self.weights(memory).matrices(self._spec)


class StoredLayout:
    """An expert as it is stored: a half to a quarter of the bytes of a quantised one."""

    def __init__(self, dtype: torch.dtype, spec: FfnSpec, form: ExpertMatrices) -> None:
        self.dtype = dtype
        self._spec = spec
        self._form = form
        self._parts = Parts.of(_present(form))

    @classmethod
    def of(cls, loader: ExpertLoader, dtype: torch.dtype) -> StoredLayout | None:
        """Of all experts of a model; None where they are not quantised."""
        form = loader.form()
        formats = (form.gate_up.format, form.down.format)
        return None if WeightFormat.PLAIN in formats else cls(dtype, loader.spec, form)

    @property
    def nbytes(self) -> int:
        """See SlotLayout."""
        return self._parts.nbytes

    def pack(self, key: ExpertKey, ram: WeightsTier, memory: Tensor) -> None:
        """See SlotLayout."""
        with ram.as_stored(key) as matrices:
            self._parts.write(_present(matrices), memory)

    def weights(self, memory: Tensor) -> ExpertWeights:
        """See SlotLayout. New tensors, with the values that the processor computes with."""
        return widened(self.matrices(memory), self._spec, self.dtype)

    def matrices(self, memory: Tensor) -> ExpertMatrices:
        """See SlotLayout."""
        views = iter(self._parts.views(memory))
        fields = [None if part is None else next(views) for part in _fields(self._form)]
        gate_up, down = (
            WeightMatrix(matrix.format, data, scale, zero, matrix.block)
            for matrix, (data, scale, zero) in (
                (self._form.gate_up, fields[:3]),
                (self._form.down, fields[3:6]),
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
