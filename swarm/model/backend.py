"""Who computes a layer's routed experts.

`ExpertsBackend` is all that the transformers plug-in knows. `LocalExperts` is the one without a network: weights from
this machine's files through the RAM tier, results equal to transformers' eager experts bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moehive.kernels.combine import add_token_row, combine_rows
from moehive.kernels.expert_ffn import expert_ffn
from moehive.kernels.routing import group_by_expert, order_of_token
from moehive.protocol.errors import BudgetTooSmall
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest
from moehive.swarm.memory import default_ram_budget
from moehive.swarm.policy.budgets import least_ram
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.stats import TierStats

from .loader import ExpertLoader
from .tier import WeightsKey, WeightsTier


class ExpertsBackend(Protocol):
    """Computes the weighted sum of the chosen experts of one decoder layer. Called from any thread."""

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The layer's routed output [T, H], of `hidden`'s dtype and device.

        `hidden` is [T, H]; `top_k_index` [T, K] int64, where the number of experts stands for "none"; `top_k_weights`
        [T, K], possibly of a wider dtype than `hidden`. An error leaves `generate` as it is; nothing is left out.
        """


class Watcher(Protocol):
    """Somebody who wants to know what is computed, such as prefetch. Returns at once and raises nothing."""

    def computing(self, layer: int, hidden: Tensor, experts: Sequence[int]) -> None:
        """`experts` of `layer` are about to compute with `hidden` [T, H]; loads of absent ones have begun."""


@runtime_checkable
class Tiered(Protocol):
    """A backend that keeps experts in memory tiers of this machine, over its disk."""

    @property
    def tier_stats(self) -> TierStats:
        """Of the RAM tier; its misses came from the tier below, or were read from this machine's disk."""

    @property
    def stored_stats(self) -> TierStats | None:
        """Of the part of RAM below it that holds experts as they are stored; None where there is none."""

    @property
    def device_stats(self) -> TierStats | None:
        """Of the tier in an accelerator's memory, whose misses are uses of the RAM tier; None where there is none."""


class LocalExperts:
    """An ExpertsBackend over experts that are all on this machine's disk."""

    def __init__(self, loader: ExpertLoader, tier: WeightsTier) -> None:
        self._num_experts = loader.num_experts
        self.loader = loader
        self._spec = loader.spec
        self.top_k = loader.top_k
        self.tier = tier
        self.watcher: Watcher | None = None
        self._keys: dict[tuple[int, torch.dtype], Sequence[WeightsKey]] = {}

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether all experts of the model have room at a time, computing in `dtype`."""
        return self.loader.total_room(dtype) <= self.tier.budget_bytes

    @property
    def tier_stats(self) -> TierStats:
        """See Tiered."""
        return self.tier.stats

    @property
    def stored_stats(self) -> TierStats | None:
        """See Tiered."""
        return self.tier.stored_stats

    @property
    def device_stats(self) -> None:
        """None: the processor computes."""

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsBackend. Raises what `ExpertLoader.load` and RamTier.lease raise."""
        out = torch.zeros_like(hidden)  # [T, H]
        try:
            if hidden.shape[0] == 1:
                self._add_token(layer, out, hidden, top_k_index, top_k_weights)
                return out
            return self._add_tokens(layer, out, hidden, top_k_index, top_k_weights)
        except BaseException as error:
            self.tier.abandon(error)
            raise

    def _add_tokens(self, layer: int, out: Tensor, hidden: Tensor, top_k_index: Tensor, weights: Tensor) -> Tensor:
        """`run` for several tokens, added to `out` [T, H]."""
        groups = group_by_expert(top_k_index, self._num_experts)
        counts = {_key(layer, group.expert, hidden): group.token.shape[0] for group in groups}
        self.tier.note(Uses(layer, counts, hidden.shape[0]))
        if self.watcher is not None:
            self.watcher.computing(layer, hidden, [group.expert for group in groups])
        outputs = ((group, self._rows(layer, group.expert, hidden.index_select(0, group.token))) for group in groups)
        return combine_rows(out, outputs, weights)

    def _add_token(self, layer: int, out: Tensor, hidden: Tensor, top_k_index: Tensor, weights: Tensor) -> None:
        """`run` for one token, added to `out` [1, H]. What is resident is computed first: the others load meanwhile."""
        order = order_of_token(top_k_index, self._num_experts)
        keys, here = self._layer_keys(layer, hidden.dtype), hidden.is_cpu
        rows: dict[int, Tensor] = {}  # expert: its output [1, H]
        # A router of somebody's own may choose an expert twice, with two weights.
        held = self.tier.hold(layer, [keys[expert] for expert, _ in order])
        try:
            if self.watcher is not None:
                self.watcher.computing(layer, hidden, list(dict.fromkeys(expert for expert, _ in order)))
            for (expert, _), entry in zip(order, held.entries, strict=True):
                if entry is not None:
                    # In no variable: that would be memory that nobody counts once the entry is released.
                    rows[expert] = expert_ffn(
                        hidden, entry.value if here else entry.value.to(hidden.device), self._spec
                    )
        finally:
            self.tier.release(held)
        for expert, position in order:
            if expert not in rows:
                rows[expert] = self._rows(layer, expert, hidden)
            add_token_row(out, rows[expert], position, weights)

    def _layer_keys(self, layer: int, dtype: torch.dtype) -> Sequence[WeightsKey]:
        """By expert. Made once: decoding asks for some of them at every layer and token."""
        keys = self._keys.get((layer, dtype))
        if keys is None:
            keys = self._keys[layer, dtype] = [(ExpertKey(layer, expert), dtype) for expert in range(self._num_experts)]
        return keys

    def _rows(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        """One expert's unweighted output [R, H] for `rows` [R, H]."""
        with self.tier.lease(_key(layer, expert, rows)) as weights:
            output = expert_ffn(rows, weights.to(rows.device), self._spec)
            del weights  # it is not counted after its lease
        return output


def _key(layer: int, expert: int, rows: Tensor) -> WeightsKey:
    """The rows say in which dtype the model computes: a tier may hold an expert in more than one."""
    return ExpertKey(layer, expert), rows.dtype


def local_experts(manifest: Manifest, source: ObjectSource, dtype: torch.dtype, ram: int | None = None) -> LocalExperts:
    """The experts of a model that computes in `dtype`, with `ram` bytes for them in memory (None: from this machine's).

    Raises BudgetTooSmall where that is less than a token's experts need, and names the least that works.
    """
    loader = ExpertLoader(manifest, source)
    budget = default_ram_budget() if ram is None else ram
    check_ram(manifest, loader.largest_room(dtype), budget)
    tier = WeightsTier(loader, budget)
    tier.hold_stored(dtype, len(manifest.experts))
    return LocalExperts(loader, tier)


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
