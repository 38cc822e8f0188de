"""Experts of one model in host memory: in the form that is computed with, over the form that they are stored in.

Quantised experts are computed with in floating point, which takes two to four times their bytes. How much of a budget
holds them as they are stored is policy (policy/budgets.py, `bytes_as_stored`). An expert of that part needs no disk: it
is widened into the other part, in a buffer that is used again, and what is computed with it is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.cpu.packed import can_pack, pack_weights, packed_bytes
from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.formats import ExpertMatrices
from moehive.protocol.ids import ExpertKey
from moehive.swarm.policy.budgets import ExpertForms, bytes_as_stored, least_experts, stays_widened
from moehive.swarm.tiers.leases import Lease
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.stats import TierStats

from .loader import ExpertLoader, StoredExpert

WeightsKey: TypeAlias = tuple[ExpertKey, torch.dtype]

# What the policy reckons with. The page cache is not promised where memory is short, so reading is a disk's.
_READ: Final = 0.5e9  # bytes per second, verified
_WIDEN: Final = 1e9  # weights per second and thread: measured 1.0e9 for MXFP4, 1.0e9 to 1.6e9 for FP8, 1.9e9 for INT4


class WeightsTier(RamTier[WeightsKey, ExpertWeights]):
    """Experts as they are computed with, within `budget_bytes`; `hold_stored` takes a part of that for stored ones.

    `read` stands for `loader.read`.
    """

    def __init__(
        self, loader: ExpertLoader, budget_bytes: int, *, read: Callable[[ExpertKey], StoredExpert] | None = None
    ) -> None:
        self._loader = loader
        self._read = loader.read if read is None else read
        self._whole = budget_bytes
        self._packs = False
        self.stored: RamTier[ExpertKey, StoredExpert] = RamTier(
            0,
            self._read,
            room=loader.stored_room,
            size=_stored_size,
            group=lambda key: key.layer,
            name="RAM tier as stored",
            loaders=0,
            out_of_memory=is_out_of_memory,
            freed=loader.buffers.drop,
        )
        super().__init__(
            budget_bytes,
            self._make,
            room=self._bytes_to_load,
            size=_size,
            policy=Lfru(_place, top_k=loader.top_k),
            group=lambda key: key[0].layer,
            out_of_memory=is_out_of_memory,
            freed=loader.buffers.drop,
        )

    def close(self) -> None:
        """End the loader threads; see RamTier.close."""
        super().close()
        self.stored.close()

    def hold_stored(self, dtype: torch.dtype, experts: int, *, uploads: bool = False, may_pack: bool = False) -> None:
        """Divide the budget for the use of `experts` experts in `dtype`: to be called again when their number changes.

        `uploads`: an accelerator takes them as they are stored, so that this is the form to have them in. `may_pack`:
        where all of them stay, they may be packed for the processor's fast products (kernels/cpu/packed.py).
        """
        forms = forms_of(self._loader, dtype, experts)
        fits = stays_widened(self._whole, forms)
        self._packs = may_pack and fits and dtype == torch.bfloat16 and not self._loader.spec.transposed and can_pack()
        share = bytes_as_stored(self._whole, forms, always=uploads)
        self.stored.resize(min(share, self.stored.budget_bytes))  # what grows comes last
        self.resize(self._whole - share)
        self.stored.resize(share)

    @contextmanager
    def as_stored(self, key: ExpertKey) -> Iterator[ExpertMatrices]:
        """An expert as it is stored, from memory or read for this. Raises what RamTier.lease and `read` raise."""
        if not self.stored.budget_bytes:
            yield self._loader.matrices(key, self._read(key))
            return
        with self._lease_stored(key) as tensors:
            yield self._loader.matrices(key, tensors)

    @property
    def stored_stats(self) -> TierStats | None:
        """Of the part that holds experts as they are stored; None where it has no bytes."""
        return self.stored.stats if self.stored.budget_bytes else None

    def _make(self, key: WeightsKey) -> ExpertWeights:
        weights = self._widened(key)
        return pack_weights(weights) if self._packs and key[1] == torch.bfloat16 else weights

    def _widened(self, key: WeightsKey) -> ExpertWeights:
        expert, dtype = key
        if not self.stored.budget_bytes:
            return self._loader.widen(expert, self._read(expert), dtype)
        with self._lease_stored(expert) as tensors:
            return self._loader.widen(expert, tensors, dtype)

    def _lease_stored(self, key: ExpertKey) -> Lease[ExpertKey, StoredExpert]:
        self.stored.note(Uses(key.layer, {key: 1}), ahead=False)
        return self.stored.lease(key)

    def _bytes_to_load(self, key: WeightsKey) -> int:
        expert, dtype = key
        if not self.stored.budget_bytes:
            return self._loader.room(expert, dtype) + (self._loader.widened_room(dtype) if self._packs else 0)
        return max(self._loader.widened_room(dtype), self._loader.stored_room(expert))


def forms_of(loader: ExpertLoader, dtype: torch.dtype, experts: int) -> ExpertForms:
    """The facts about `experts` experts of a model, the largest of them for all."""
    stored = max(loader.stored_room(key) for key in loader.manifest.experts)
    weights = loader.nbytes(dtype) / dtype.itemsize
    return ExpertForms(
        count=experts,
        stored=stored,
        widened=loader.largest_room(dtype) if loader.is_view(dtype) else loader.widened_room(dtype),
        floor=least_experts(loader.top_k),
        read=stored / _READ,
        widen=weights / (_WIDEN * torch.get_num_threads()),
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine had no memory: as Python says it, as torch's allocators say it."""
    allocator = isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in str(error) or "allocate memory" in str(error)
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or allocator


def _place(key: WeightsKey) -> tuple[int, int]:
    return key[0].layer, key[0].expert


def _size(weights: ExpertWeights) -> int:
    packed = sum(packed_bytes(tensor) for tensor in weights.tensors if tensor.is_mkldnn)
    return packed + _held(tensor for tensor in weights.tensors if not tensor.is_mkldnn)


def _stored_size(tensors: StoredExpert) -> int:
    return _held(tensors.values())


def _held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all memory that tensors keep alive: of whole buffers, where they are views."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
