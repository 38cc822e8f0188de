"""Experts of one model in host memory: in the form that is computed with, over the form that they are stored in.

Quantised experts are computed with in floating point, which takes two to four times their bytes. How much of a budget
holds them as they are stored is policy (policy/budgets.py, `bytes_as_stored`). An expert of that part needs no disk: it
is widened into the other part, in a buffer that is used again, and what is computed with it is the same bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.cpu.packed import can_pack, pack_weights, packed_bytes
from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.formats import ExpertMatrices
from moehive.protocol.errors import BudgetTooSmall, MemoryExhausted
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


@dataclass(frozen=True, slots=True)
class _Way:
    """How one expert is made ready. Chosen when room is promised to it, so that what it takes is what was promised."""

    from_stored: bool  # from the part of RAM that holds experts as they are stored, which reads it where it is absent
    packs: bool


class WeightsTier(RamTier[WeightsKey, ExpertWeights]):
    """Experts as they are computed with, within `budget_bytes`; `hold_stored` takes a part of that for stored ones.

    Buffers that are free are within it, too. `read` stands for `loader.read`.
    """

    def __init__(
        self, loader: ExpertLoader, budget_bytes: int, *, read: Callable[[ExpertKey], StoredExpert] | None = None
    ) -> None:
        self._loader = loader
        self._read = loader.read if read is None else read
        self._holds_stored = self._packs = False
        self._ways: dict[WeightsKey, _Way] = {}  # of the last load of each
        self._dividing = threading.Lock()
        self._growing: RamTier[Any, Any] = self  # the part that the last division made larger,
        self._to_grow = 0  # by so many bytes more, once the other has released them
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
            # What the part below could not get although it shrank, this one may be able to give.
            out_of_memory=lambda error: is_out_of_memory(error) or isinstance(error, MemoryExhausted),
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

        What is divided is the budget that is left where memory ran out before. At any time, also while experts are
        used and loaded: neither part grows before the other has released the bytes.
        """
        forms = forms_of(self._loader, dtype, experts)
        packable = may_pack and dtype == torch.bfloat16 and not self._loader.spec.transposed and can_pack()
        with self._dividing:
            whole = self.budget_bytes + self.stored.budget_bytes + self._to_grow
            share = bytes_as_stored(whole, forms, always=uploads)
            self._holds_stored = share > 0
            self._packs = packable and not share and stays_widened(whole, packed_forms(self._loader, forms))
            self._loader.buffers.keep(not self._packs)
            self._divide(whole, share)
        self._grow()

    def set_aside(self, size: int, what: str, dtype: torch.dtype) -> None:
        """Take `size` bytes from the budget for `what`, for good.

        Raises BudgetTooSmall where one expert of `dtype` has no room beside it, and names the least that works.
        """
        least = size + self._loader.largest_room(dtype)
        if self.budget_bytes < least:
            raise BudgetTooSmall(f"memory for one expert, and for {what}", budget=self.budget_bytes, needed=least)
        self.resize(self.budget_bytes - size)

    def abandon(self, error: BaseException) -> None:
        """See RamTier.abandon. Of both parts."""
        super().abandon(error)
        self.stored.abandon(error)

    @contextmanager
    def as_stored(self, key: ExpertKey) -> Iterator[ExpertMatrices]:
        """An expert as it is stored, from memory or read for this. Raises what RamTier.lease and `read` raise."""
        if self._stored_takes(key):
            with self._lease_stored(key) as tensors:
                matrices = [self._loader.matrices(key, tensors)]
                del tensors  # as all of these: memory that nobody counts any more when the lease ends
                yield matrices.pop()
        else:
            with self.borrow(self._loader.stored_room(key), f"{key} as it is stored"):
                yield self._loader.matrices(key, self._read(key))

    @property
    def stored_stats(self) -> TierStats | None:
        """Of the part that holds experts as they are stored; None where it has no bytes."""
        return self.stored.stats if self.stored.budget_bytes else None

    # --- division -------------------------------------------------------------------------------------------------

    def _divide(self, whole: int, share: int) -> None:
        """Shrink what is to shrink. Once there is a part for stored ones it keeps room for any of them: loads that
        were promised room by it may be under way."""
        if self.stored.budget_bytes:
            share = max(share, self._largest_stored)
        self._growing = self.stored if share > self.stored.budget_bytes else self
        self.stored.resize(min(share, self.stored.budget_bytes))
        self.resize(min(whole - share, self.budget_bytes))
        self._to_grow = whole - self.budget_bytes - self.stored.budget_bytes

    def _grow(self) -> None:
        """Let one part grow by what the other has released."""
        if not self._to_grow:
            return
        with self._dividing:
            other = self.stored if self._growing is self else self
            released = self._to_grow - other.excess_bytes
            if released > 0:
                self._to_grow -= released
                self._growing.resize(self._growing.budget_bytes + released)

    @cached_property
    def _largest_stored(self) -> int:
        return max(self._loader.stored_room(key) for key in self._loader.manifest.experts)

    def _stored_takes(self, key: ExpertKey) -> bool:
        return self._holds_stored and self._loader.stored_room(key) <= self.stored.budget_bytes

    # --- loading --------------------------------------------------------------------------------------------------

    def _bytes_to_load(self, key: WeightsKey) -> int:
        expert, dtype = key
        loader, views = self._loader, self._loader.is_view(*key)
        way = _Way(not views and self._stored_takes(expert), self._packs and dtype == torch.bfloat16)
        self._ways[key] = way
        if way.from_stored:
            return max(loader.widened_room(dtype), loader.stored_room(expert))
        return loader.room(expert, dtype) + (loader.packed_room() if way.packs else 0)

    def _make(self, key: WeightsKey) -> ExpertWeights:
        self._grow()
        (expert, dtype), way = key, self._ways[key]
        if way.from_stored:
            with self._lease_stored(expert) as tensors:
                weights = self._loader.widen(expert, tensors, dtype)
                del tensors
            return weights
        weights = self._loader.widen(expert, self._read(expert), dtype)
        return pack_weights(weights) if way.packs else weights

    def _lease_stored(self, key: ExpertKey) -> Lease[ExpertKey, StoredExpert]:
        self.stored.note(Uses(key.layer, {key: 1}), ahead=False)
        return self.stored.lease(key)


def forms_of(loader: ExpertLoader, dtype: torch.dtype, experts: int) -> ExpertForms:
    """The facts about `experts` experts of a model: as stored the mean of them, else the largest."""
    keys = loader.manifest.experts
    stored = -(-sum(loader.stored_size(key) for key in keys) // len(keys))
    kept = {key: loader.stored_size(key) if loader.is_view(key, dtype) else loader.widened_room(dtype) for key in keys}
    weights = loader.nbytes(dtype) / dtype.itemsize
    return ExpertForms(
        count=experts,
        stored=stored,
        widened=max(kept.values()),
        making=max(loader.room(key, dtype) - size for key, size in kept.items()),
        floor=least_experts(loader.top_k),
        read=stored / _READ,
        widen=weights / (_WIDEN * torch.get_num_threads()),
    )


def packed_forms(loader: ExpertLoader, forms: ExpertForms) -> ExpertForms:
    """The same where bf16 experts are packed: each is there in the form that it is packed from while it is made."""
    return replace(forms, widened=loader.packed_room(), making=forms.widened + forms.making)


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
