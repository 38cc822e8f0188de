"""Experts from where they are stored: verified, as they lie there or as they are computed with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import Final, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.canonical import Empty, canonical_weights, stored_matrices
from moehive.kernels.cpu.packed import most_packed_bytes
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.repacking import repacked
from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ExpertFfn, Manifest
from moehive.swarm.store.base import ObjectSource

from .buffers import HostBuffers
from .reading import read_tensors, tensor_table
from .tensors import ALIGNMENT, TORCH_DTYPE, TURNED_PACKING, first_offset, short_name, tensors_of


def spec_of(ffn: ExpertFfn) -> FfnSpec:
    """A manifest's description of the experts in the kernels' terms. Raises ManifestError for unknown mathematics."""
    try:
        return FfnSpec(ffn.gate.value, ffn.activation, ffn.transposed, ffn.alpha, ffn.limit)
    except ValueError as error:
        raise ManifestError(f"expertFfn: {error}") from error


StoredExpert: TypeAlias = Mapping[str, Tensor]  # by short names: see kernels/canonical.py
_PARTS: Final = 4  # tensors of an expert's weights


class ExpertLoader:
    """Experts of one model from `source` in the form that is computed with. Thread-safe; keeps only free buffers."""

    def __init__(self, manifest: Manifest, source: ObjectSource) -> None:
        self.spec = spec_of(manifest.model.ffn)
        self.num_experts = manifest.model.num_experts
        self.top_k = manifest.model.top_k
        self._manifest = manifest
        self._source = source
        quantization = manifest.model.quantization
        self._block = quantization.block if quantization else None
        self._turned = TURNED_PACKING.get(quantization.method) if quantization else None
        self._biased = manifest.model.ffn.bias
        self.buffers = HostBuffers()  # of shards, and of what is computed with

    @property
    def manifest(self) -> Manifest:
        """Of the model."""
        return self._manifest

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert's weights of `dtype`."""
        model = self._manifest.model
        biases = (2 * model.intermediate_size + model.hidden_size) * dtype.itemsize if model.ffn.bias else 0
        return self._matrix_bytes(dtype) + biases

    def _matrix_bytes(self, dtype: torch.dtype) -> int:
        return 3 * self._manifest.model.hidden_size * self._manifest.model.intermediate_size * dtype.itemsize

    def room(self, key: ExpertKey, dtype: torch.dtype) -> int:
        """Bytes that loading an expert takes at most: its shard, and its weights where they are not views of it."""
        return self.stored_room(key) + (0 if self.is_view(key, dtype) else self.widened_room(dtype))

    def stored_size(self, key: ExpertKey) -> int:
        """Bytes of an expert as it is stored, in a buffer."""
        return self._manifest.experts[key].size + ALIGNMENT

    def stored_room(self, key: ExpertKey) -> int:
        """Bytes that reading an expert takes at most: one that is packed the other way round is turned."""
        return self.stored_size(key) * (1 if self._turned is None else 2)

    def widened_room(self, dtype: torch.dtype) -> int:
        """Bytes of an expert's weights that are no views of its shard, at most."""
        return self.nbytes(dtype) + (_PARTS + 1) * ALIGNMENT

    def packed_room(self) -> int:
        """Bytes of an expert's bf16 weights once they are packed (kernels/cpu/packed.py), at most."""
        inner, hidden = self._manifest.model.intermediate_size, self._manifest.model.hidden_size
        biases = self.nbytes(torch.bfloat16) - self._matrix_bytes(torch.bfloat16)
        return most_packed_bytes(2 * inner, hidden) + most_packed_bytes(hidden, inner) + biases

    def is_view(self, key: ExpertKey, dtype: torch.dtype) -> bool:
        """Whether what is computed with, of `dtype`, is what is stored."""
        shard = self._manifest.experts[key]
        stored = (entry.dtype for entry in tensor_table(self._manifest, shard).values())
        return not self.spec.transposed and not self._biased and all(TORCH_DTYPE[name] == dtype for name in stored)

    def largest_room(self, dtype: torch.dtype) -> int:
        """The most that `room` says of any expert."""
        return max(self.room(key, dtype) for key in self._manifest.experts)

    def total_room(self, dtype: torch.dtype) -> int:
        """What `room` says of all experts together."""
        return sum(self.room(key, dtype) for key in self._manifest.experts)

    def load(self, key: ExpertKey, dtype: torch.dtype) -> ExpertWeights:
        """One expert's verified weights of `dtype`. Raises what `read` and `widen` raise."""
        return self.widen(key, self.read(key), dtype)

    def read(self, key: ExpertKey) -> StoredExpert:
        """One expert's verified tensors as they are stored, but rows as outputs.

        Raises NotHeld, StorageError, CorruptShard; ManifestError for packed tensors that do not fit each other.
        """
        shard = self._manifest.experts[key]
        tensors = read_tensors(self._source, self._manifest, shard, allocate=self.buffers.allocate)
        return self._turn(key, _short(tensors))

    def shard_buffer(self, key: ExpertKey) -> Tensor:
        """Memory for an expert's shard, uint8 [size]."""
        shard = self._manifest.experts[key]
        return self.buffers.allocate(shard.size, first_offset(tensor_table(self._manifest, shard)))

    def in_buffer(self, key: ExpertKey, buffer: Tensor) -> StoredExpert:
        """One expert's tensors, as `read` gives them: views of a `shard_buffer` with its verified bytes.

        Raises ManifestError.
        """
        table = tensor_table(self._manifest, self._manifest.experts[key])
        return self._turn(key, _short(tensors_of(buffer, table)))

    def _turn(self, key: ExpertKey, tensors: StoredExpert) -> StoredExpert:
        if self._turned is None:
            return tensors
        with self._explained(key):
            if self._block is None:
                raise ValueError("the manifest does not say how many weights share a scale")
            return repacked(tensors, self._turned, self._block[1])

    def widen(self, key: ExpertKey, tensors: StoredExpert, dtype: torch.dtype) -> ExpertWeights:
        """What is computed with, of `dtype`: views where nothing changes. Raises ManifestError for no such expert."""
        with self._explained(key):
            weights = canonical_weights(tensors, self.spec, dtype, block=self._block, empty=self._empty(dtype))
            self._check_shapes(tuple(weights.gate_up.shape), tuple(weights.down.shape))
            return weights

    def matrices(self, key: ExpertKey, tensors: StoredExpert) -> ExpertMatrices:
        """The same in the format that it is stored in. Raises ManifestError for tensors that make no such expert."""
        with self._explained(key):
            return stored_matrices(tensors, self.spec, block=self._block)

    @cached_property
    def forms(self) -> Mapping[ExpertKey, ExpertMatrices]:
        """Every expert as it is stored, without its values: tensors of the device "meta".

        One and the same for all experts that are stored alike; a checkpoint may leave some layers unquantised. Raises
        ManifestError.
        """
        found: dict[tuple[tuple[str, str, tuple[int, ...]], ...], ExpertMatrices] = {}
        forms = {}
        for key, shard in self._manifest.experts.items():
            table = tensor_table(self._manifest, shard)
            kinds = tuple((short_name(name), entry.dtype, tuple(entry.shape)) for name, entry in table.items())
            if kinds not in found:
                with self._explained(key):
                    blank = {name: self._blank(name, dtype, shape) for name, dtype, shape in kinds}
                found[kinds] = self.matrices(key, self._turn(key, blank))
            forms[key] = found[kinds]
        return forms

    def _blank(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of an expert without its values, but for those that are shapes or indices. Raises ValueError."""
        sides = self._manifest.model.intermediate_size, self._manifest.model.hidden_size
        if name.endswith(".g_idx") and self._block is not None:
            if prod(shape) > max(sides):  # this one is made, before a byte of the expert has come
                raise ValueError(f"{name} {shape} has more inputs than any matrix of the model's experts")
            return torch.arange(prod(shape)) // self._block[1]
        if name.endswith(".weight_shape"):
            return torch.tensor(sides[::-1] if name.startswith(("down_proj", "w2")) else sides)
        return torch.empty(shape, dtype=TORCH_DTYPE[dtype], device="meta")

    def _empty(self, dtype: torch.dtype) -> Empty:
        """Makes an expert's matrices in one buffer, which is used again when they are gone."""
        left, room = [Tensor()], self._matrix_bytes(dtype) + _PARTS * ALIGNMENT

        def empty(shape: tuple[int, ...]) -> Tensor:
            size = prod(shape) * dtype.itemsize
            if size > room:
                raise ValueError(f"a matrix of {prod(shape)} elements, which no expert of the model has")
            if left[0].numel() < size:
                left[0] = self.buffers.allocate(room, 0)
            memory, left[0] = left[0][:size], left[0][-(-size // ALIGNMENT) * ALIGNMENT :]
            return memory.view(dtype).view(shape)

        return empty

    def _check_shapes(self, *found: tuple[int, ...]) -> None:
        """Raise ValueError for other matrices than those of the model's experts, which have one shape."""
        inner, hidden = self._manifest.model.intermediate_size, self._manifest.model.hidden_size
        shapes = (2 * inner, hidden), (hidden, inner)
        wanted = tuple(shape[::-1] for shape in shapes) if self.spec.transposed else shapes
        if found != wanted:
            raise ValueError(f"an expert's matrices are {found}, the model's {wanted}")

    @contextmanager
    def _explained(self, key: ExpertKey) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ManifestError(f"{self._manifest.experts[key].file}: {error}") from error


def _short(tensors: Mapping[str, Tensor]) -> StoredExpert:
    return {short_name(name): tensor for name, tensor in tensors.items()}
