"""Who computes a layer's routed experts.

`ExpertsBackend` is all that the transformers plug-in knows. `LocalExperts` is the one without a network: weights from
this machine's files through the RAM tier, results equal to transformers' eager experts bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.canonical import canonical_weights
from moehive.kernels.combine import add_token_row, combine_rows
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import group_by_expert, order_of_token
from moehive.protocol.errors import BudgetTooSmall, ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ExpertFfn, Manifest
from moehive.swarm.memory import default_ram_budget
from moehive.swarm.policy.budgets import least_ram
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.stats import TierStats

from .reading import read_tensors, tensor_table
from .tensors import short_name, tensors_of


class ExpertsBackend(Protocol):
    """Computes the weighted sum of the chosen experts of one decoder layer. Called from any thread."""

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The layer's routed output [T, H], of `hidden`'s dtype and device.

        `hidden` is [T, H]; `top_k_index` [T, K] int64, where the number of experts stands for "none"; `top_k_weights`
        [T, K], possibly of a wider dtype than `hidden`. An error leaves `generate` as it is; nothing is left out.
        """


WeightsTier: TypeAlias = RamTier[tuple[ExpertKey, torch.dtype], ExpertWeights]


def weights_tier(budget_bytes: int) -> WeightsTier:
    """A RAM tier for experts in the form that is computed with; several models of one process may not share it."""
    return RamTier(budget_bytes, group=lambda key: key[0].layer)


def spec_of(ffn: ExpertFfn) -> FfnSpec:
    """A manifest's description of the experts in the kernels' terms. Raises ManifestError for unknown mathematics."""
    try:
        return FfnSpec(ffn.gate.value, ffn.activation, ffn.transposed, ffn.alpha, ffn.limit)
    except ValueError as error:
        raise ManifestError(f"expertFfn: {error}") from error


class ExpertLoader:
    """Experts of one model from `source` in the form that is computed with. Stateless between calls, thread-safe."""

    def __init__(self, manifest: Manifest, source: ObjectSource) -> None:
        self.spec = spec_of(manifest.model.ffn)
        self._manifest = manifest
        self._source = source
        quantization = manifest.model.quantization
        self._block = quantization.block if quantization else None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert's weights of `dtype`."""
        model = self._manifest.model
        parameters = 3 * model.hidden_size * model.intermediate_size
        if model.ffn.bias:
            parameters += 2 * model.intermediate_size + model.hidden_size
        return parameters * dtype.itemsize

    def load(self, key: ExpertKey, dtype: torch.dtype) -> ExpertWeights:
        """One expert's verified weights of `dtype`.

        Raises NotHeld, StorageError, CorruptShard; ManifestError where its tensors make no expert of this model.
        """
        return self._canonical(key, read_tensors(self._source, self._manifest, self._manifest.experts[key]), dtype)

    def from_bytes(self, key: ExpertKey, shard: bytearray, dtype: torch.dtype) -> ExpertWeights:
        """One expert's weights of `dtype` from its shard's verified bytes, a copy of them. Raises ManifestError."""
        tensors = tensors_of(bytearray(shard), tensor_table(self._manifest, self._manifest.experts[key]))
        return self._canonical(key, tensors, dtype)

    def _canonical(self, key: ExpertKey, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> ExpertWeights:
        short = {short_name(name): tensor for name, tensor in tensors.items()}
        try:
            return canonical_weights(short, self.spec, dtype, block=self._block)
        except ValueError as error:
            raise ManifestError(f"{self._manifest.experts[key].file}: {error}") from error


def _size(weights: ExpertWeights) -> int:
    return weights.nbytes


class LocalExperts:
    """An ExpertsBackend over experts that are all on this machine's disk."""

    def __init__(
        self, manifest: Manifest, source: ObjectSource, tier: WeightsTier, *, loader: ExpertLoader | None = None
    ) -> None:
        self._num_experts = manifest.model.num_experts
        self._loader = loader or ExpertLoader(manifest, source)
        self._tier = tier

    @property
    def tier_stats(self) -> TierStats:
        """Of the RAM tier; its misses were read from this machine's disk."""
        return self._tier.stats

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsBackend. Raises what `ExpertLoader.load` raises, and BudgetTooSmall."""
        out = self._run(layer, hidden, top_k_index, top_k_weights)
        self._tier.call_ended(layer)
        return out

    def _run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)  # [T, H]
        if hidden.shape[0] == 1:
            for expert, position in order_of_token(top_k_index, self._num_experts):
                add_token_row(out, self._rows(layer, expert, hidden), position, top_k_weights)
            return out
        groups = group_by_expert(top_k_index, self._num_experts)
        outputs = ((group, self._rows(layer, group.expert, hidden.index_select(0, group.token))) for group in groups)
        return combine_rows(out, outputs, top_k_weights)

    def _rows(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        """One expert's unweighted output [R, H] for `rows` [R, H]."""
        key = ExpertKey(layer, expert)
        # The rows say in which dtype the model computes: a tier may hold an expert in more than one.
        load, hint = partial(self._loader.load, key, rows.dtype), self._loader.nbytes(rows.dtype)
        with self._tier.lease((key, rows.dtype), load, _size, size_hint=hint) as weights:
            return expert_ffn(rows, weights.to(rows.device), self._loader.spec)


def local_experts(manifest: Manifest, source: ObjectSource, dtype: torch.dtype, ram: int | None = None) -> LocalExperts:
    """The experts of a model that computes in `dtype`, with `ram` bytes for them in memory (None: from this machine's).

    Raises BudgetTooSmall where that is less than a token's experts need, and names the least that works.
    """
    loader = ExpertLoader(manifest, source)
    budget = default_ram_budget() if ram is None else ram
    check_ram(manifest, loader.nbytes(dtype), budget)
    return LocalExperts(manifest, source, weights_tier(budget), loader=loader)


def check_ram(manifest: Manifest, expert_bytes: int, budget: int) -> None:
    """Raise BudgetTooSmall for a budget that cannot hold what one token needs. See `least_ram`."""
    least = min(least_ram(expert_bytes, manifest.model.top_k), len(manifest.experts) * expert_bytes)
    if budget < least:
        raise BudgetTooSmall(f"memory for experts of {manifest.model.name}", budget=budget, needed=least)


# Who computes the experts of a model that is being loaded in this context: from_pretrained carries no word to the
# plug-in, which by then has to know whether this machine's memory matters.
BACKEND: ContextVar[Callable[[Manifest, ObjectSource, torch.dtype], ExpertsBackend]] = ContextVar(
    "backend", default=local_experts
)
