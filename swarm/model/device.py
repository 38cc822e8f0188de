"""Routed experts on an accelerator: a tier in its memory, over the RAM tier, over the disk.

What is resident there is computed there. Of what is not, a part is uploaded and waited for and the processor computes
the rest from RAM meanwhile (policy/offload.py): the same experts for the same rows either way, nothing left out.

On a GPU the experts that are there are computed by one launch of the kernels (grouped.py), in the format that they are
stored in where the kernels read it. With torch's products the order in which outputs are added is eager's, so that on
one device results equal those of `LocalExperts` bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moehive.kernels.combine import add_token_row, combine_rows
from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.routing import Assignment, group_by_expert, order_of_token
from moehive.protocol.errors import BudgetTooSmall, ConfigError, MemoryExhausted
from moehive.protocol.ids import ExpertKey
from moehive.swarm.log import get_logger
from moehive.swarm.memory import default_vram_budget
from moehive.swarm.policy.budgets import least_ram
from moehive.swarm.policy.offload import Costs, uploads_to_await
from moehive.swarm.tiers.accelerator import Accelerator, TorchAccelerator
from moehive.swarm.tiers.device import UPLOADS, DeviceLease, DeviceTier, Slot
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.stats import TierStats

from .backend import LocalExperts
from .device_call import PROCESSOR, CallInputs, CallPlan, WeightedRows
from .device_sums import DeviceSums
from .loader import ExpertLoader
from .seats import attach_backend, backend_of
from .slots import ExpertLayout, SlotLayout, StoredLayout
from .tier import WeightsTier, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .grouped import GroupedExperts

_log = get_logger(__name__)


class DeviceExperts:
    """An ExpertsBackend for a model that is on `accelerator`, with `budget` bytes for experts there.

    `kernels`: whether our kernels compute there, by default on a GPU; else torch's products do, one by one. Where it
    `takes_stored`, `ram` should hold experts so (WeightsTier.hold_stored).

    Computes in `dtype`; calls in another are computed by the processor. The host memory that uploads go through is
    taken from the budget of `ram`. Raises BudgetTooSmall where the budget holds less than a token's experts need, or
    that of `ram` nothing beside the uploads, and names the least that works.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        ram: WeightsTier,
        accelerator: Accelerator,
        dtype: torch.dtype,
        budget: int,
        *,
        kernels: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        manifest = loader.manifest
        self._num_experts = loader.num_experts
        self.spec = loader.spec
        if kernels is None:
            kernels = accelerator.device.type == "cuda"
        self._layout = slot_layout(loader, dtype, kernels=kernels)
        self.grouped = grouped_experts(loader, self._layout, accelerator.device) if kernels else None
        slot, everything = self._layout.nbytes, len(manifest.experts) * self._layout.nbytes
        needed = min(least_ram(slot, loader.top_k), everything)
        if budget < needed:
            what = f"{accelerator.device} memory for experts of {manifest.model.name}"
            raise BudgetTooSmall(what, budget=budget, needed=needed)
        self.tier: DeviceTier[ExpertKey] = DeviceTier(
            accelerator,
            min(budget, everything),
            slot,
            lambda key, memory: self._layout.pack(key, ram, memory),
            place=lambda key: (key.layer, key.expert),
            top_k=loader.top_k,
            out_of_memory=is_out_of_memory,
        )
        ram.set_aside(self.tier.staging_bytes, f"uploads to {accelerator.device}", dtype)
        self.ram = ram
        self.device = accelerator.device
        self.costs = Costs()
        self._views: dict[tuple[int, int], ExpertWeights] = {}  # by slot and form
        self._matrices: dict[tuple[int, int], ExpertMatrices] = {}  # by slot and form
        self._clock = clock

    def close(self) -> None:
        """End the threads of both tiers."""
        self.tier.close()
        self.ram.close()

    @property
    def slots(self) -> int:
        """How many experts the device has room for."""
        return self.tier.budget_bytes // self.tier.slot_bytes

    @property
    def takes_stored(self) -> bool:
        """Whether experts lie on the device as they are stored."""
        return isinstance(self._layout, StoredLayout)

    @property
    def tier_stats(self) -> TierStats:
        """Of the RAM tier; a use of it is a miss of the device's tier."""
        return self.ram.stats

    @property
    def stored_stats(self) -> TierStats | None:
        """See Tiered."""
        return self.ram.stored_stats

    @property
    def device_stats(self) -> TierStats:
        """Of the tier in device memory."""
        return self.tier.stats

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsBackend. Raises what `ExpertLoader.load` and RamTier.lease raise."""
        try:
            return self._run(layer, hidden, top_k_index, top_k_weights)
        except BaseException as error:
            self.abandon(error)
            raise

    def abandon(self, error: BaseException) -> None:
        """See RamTier.abandon. Of both tiers."""
        self.tier.abandon(error)
        self.ram.abandon(error)

    def _run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.to(PROCESSOR)
        if self.grouped is not None:
            return self._sum(layer, hidden, group_by_expert(chosen, self._num_experts), top_k_weights)
        out = torch.zeros_like(hidden)  # [T, H]
        if hidden.shape[0] == 1:
            order = order_of_token(chosen, self._num_experts)
            plan = self.plan(layer, {expert: 1 for expert, _ in order}, 1, hidden.dtype)
            inputs = CallInputs(hidden, plan)
            rows = {expert: self._rows(plan, expert, inputs) for expert in plan.order}
            for expert, position in order:
                add_token_row(out, rows[expert], position, top_k_weights)
            return out
        groups = group_by_expert(chosen, self._num_experts)
        counts = {group.expert: group.token.shape[0] for group in groups}
        plan = self.plan(layer, counts, hidden.shape[0], hidden.dtype)
        inputs = CallInputs(hidden, plan)
        there = [group._replace(token=group.token.to(out.device), position=group.position.to(out.device))
                 for group in groups]  # fmt: skip
        outputs = ((group, self._ahead(plan, group.expert, inputs, group.token)) for group in there)
        return combine_rows(out, outputs, top_k_weights)

    def plan(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> CallPlan:
        """Begin a call: `rows` by expert, in the order of their use. Uploads of what is absent begin."""
        if dtype != self._layout.dtype:
            self._note_ram(layer, rows, tokens, dtype)
            return CallPlan(layer, dtype, rows, frozenset(rows), ())
        uses = Uses(layer, {ExpertKey(layer, expert): count for expert, count in rows.items()}, tokens)
        missing = self.tier.note(uses)
        if not missing:
            return CallPlan(layer, dtype, rows, frozenset(), ())
        if not self.takes_stored:  # else the RAM tier has nothing that an upload needs
            self._note_ram(layer, {key.expert: uses.rows[key] for key in missing}, tokens, dtype)
        order = sorted(missing, key=lambda key: -uses.rows[key])
        coming = self.tier.begin(layer, order[:UPLOADS] if tokens == 1 else order)
        order = [*coming, *(key for key in order if key not in coming)]
        # One token's calls are short: what did not find a thread or a slot at once would come too late.
        most = len(coming) if tokens == 1 else len(order)
        count = uploads_to_await([uses.rows[key] for key in order], self.costs_now, most)
        self.tier.spare(layer, [key for key in uses.rows if key not in order[count:]])
        processor = frozenset(key.expert for key in order[count:])
        if self.takes_stored and processor:
            self._note_ram(layer, {expert: rows[expert] for expert in sorted(processor)}, tokens, dtype)
        return CallPlan(layer, dtype, rows, processor, sorted(key.expert for key in order[:count]))

    @property
    def costs_now(self) -> Costs:
        """What was measured so far."""
        return Costs(self.tier.upload_seconds, self.costs.few, self.costs.row)

    @contextmanager
    def lease(self, plan: CallPlan, expert: int, *, most_rows: int = 1 << 30) -> Iterator[ExpertWeights]:
        """An expert's weights, on the device or in host memory, where rows are to be computed with them.

        At most `most_rows` of the call's rows, inside the `with`: how long the processor takes is measured.
        """
        key = ExpertKey(plan.layer, expert)
        with ExitStack() as stack:
            slot = None if expert in plan.processor else self.enter(stack, key)
            if slot is not None:
                yield self.weights_in(slot, key)
                return
            yield stack.enter_context(self.lease_here(plan, expert, most_rows))

    def try_lease(self, key: ExpertKey, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights] | None:
        """The weights of an expert that is on the device, to be entered once; None where it is not."""
        lease = self.tier.try_lease(key) if dtype == self._layout.dtype else None
        return None if lease is None else self._weights_of(lease, key)

    @contextmanager
    def _weights_of(self, lease: DeviceLease[ExpertKey], key: ExpertKey) -> Iterator[ExpertWeights]:
        with lease as slot:
            yield self.weights_in(slot, key)

    def upload(self, key: ExpertKey, dtype: torch.dtype) -> None:
        """Begin to bring an expert that is in RAM to the device, if a thread is free and a slot is worth it.

        It stays in RAM until it is there: who has it from the swarm has no disk to load it from again.
        """
        in_ram = self.ram.try_lease((key, dtype)) if dtype == self._layout.dtype else None
        if in_ram is None:
            return
        held = ExitStack()
        held.enter_context(in_ram)
        if self.tier.begin_one(key, held.close):
            in_ram.thread = 0  # the use is the upload's now, however this thread ends
        else:
            held.close()

    def note(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> None:
        """What a call uses, where nothing has to wait for it."""
        if dtype == self._layout.dtype:
            self.tier.note(Uses(layer, {ExpertKey(layer, expert): count for expert, count in rows.items()}, tokens))

    @contextmanager
    def lease_here(self, plan: CallPlan, expert: int, most_rows: int) -> Iterator[ExpertWeights]:
        """In host memory; how long the processor takes is measured."""
        with self.ram.lease((ExpertKey(plan.layer, expert), plan.dtype)) as weights:
            started = self._clock()
            yield weights
            del weights  # they are not counted after their lease
            self.costs = self.costs.measured(min(plan.rows[expert], most_rows), self._clock() - started)

    def weights_in(self, slot: Slot, key: ExpertKey) -> ExpertWeights:
        """What torch computes with, of a slot that is leased for an expert."""
        form = self.form_of(key)
        weights = self._views.get((slot.index, form))
        if weights is None:
            weights = self._layout.weights(form, slot.memory)
            if not self.takes_stored:  # views, which change with the slot
                self._views[slot.index, form] = weights
        return weights

    def matrices_in(self, slot: Slot, key: ExpertKey) -> ExpertMatrices:
        """What the kernels compute with, of a slot that is leased for an expert."""
        form = self.form_of(key)
        matrices = self._matrices.get((slot.index, form))
        if matrices is None:
            matrices = self._matrices[slot.index, form] = self._layout.matrices(form, slot.memory)
        return matrices

    def form_of(self, key: ExpertKey) -> int:
        """Experts of one number lie alike in their slots, so that one launch can compute them together."""
        return self._layout.form_of(key)

    def enter(self, stack: ExitStack, key: ExpertKey) -> Slot | None:
        """A leased slot; None where the device has no memory for it, or too much is in use: the processor can do it."""
        try:
            return stack.enter_context(self.tier.lease(key))
        except (BudgetTooSmall, MemoryExhausted) as error:
            _log.warning("an expert finds no room in device memory; the processor computes it", reason=str(error))
            return None

    def add_sums(
        self, layer: int, hidden: Tensor, groups: Sequence[WeightedRows], total: Tensor, *, slice_rows: int = 1 << 30
    ) -> Iterator[int]:
        """Add the weighted sum over the experts of `groups`, ascending, to total [T, H] fp32, for hidden [T, H].

        Yields the number of rows after each step, of which the processor's have at most `slice_rows`. Sums are fp32;
        the experts on the device are added up there, the processor's here. `total` is complete at the end.
        """
        counts = {group.expert: group.token.shape[0] for group in groups}
        plan = self.plan(layer, counts, hidden.shape[0], hidden.dtype)
        return DeviceSums(self, plan, hidden).add(groups, total, slice_rows)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _sum(self, layer: int, hidden: Tensor, groups: Sequence[Assignment], top_k_weights: Tensor) -> Tensor:
        """All of a call [T, H]."""
        weights = top_k_weights.to(PROCESSOR)
        weighted = [WeightedRows(one.expert, one.token, weights[one.token, one.position]) for one in groups]
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
        for _ in self.add_sums(layer, hidden, weighted, total):
            pass
        return total.to(hidden.dtype)

    def begin_next(self, plan: CallPlan, experts: Sequence[int]) -> None:
        """Begin to upload the next of `experts`, which are awaited in that order."""
        if experts:
            self.tier.begin(plan.layer, [ExpertKey(plan.layer, expert) for expert in experts[:UPLOADS]])

    def _ahead(self, plan: CallPlan, expert: int, inputs: CallInputs, token: Tensor) -> Tensor:
        """`_rows`, after uploads for the next experts began."""
        self.begin_next(plan, [other for other in plan.awaited if other > expert])
        return self._rows(plan, expert, inputs, token)

    def _rows(self, plan: CallPlan, expert: int, inputs: CallInputs, token: Tensor | None = None) -> Tensor:
        """Unweighted output [R, H] for the rows `token` [R] of the call, or all, on the call's device."""
        with self.lease(plan, expert) as weights:
            rows = inputs.on(weights.gate_up.device)
            if token is not None:
                rows = rows.index_select(0, token.to(rows.device))  # [R, H]
            return expert_ffn(rows, weights, self.spec).to(inputs.device)

    def _note_ram(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> None:
        self.ram.note(Uses(layer, {(ExpertKey(layer, expert), dtype): n for expert, n in rows.items()}, tokens))


def slot_layout(loader: ExpertLoader, dtype: torch.dtype, *, kernels: bool) -> SlotLayout:
    """How experts of a model lie on a device: as they are stored where `kernels` compute with that, else in `dtype`."""
    if kernels:
        from .grouped import reads

        stored = StoredLayout.of(loader, dtype)
        if stored is not None and all(map(reads, stored.forms)):
            return stored
    return ExpertLayout.of(loader.manifest.model, dtype)


def grouped_experts(loader: ExpertLoader, layout: SlotLayout, device: torch.device) -> GroupedExperts | None:
    """What computes all experts of a layer together; None where the kernels do not read them."""
    from .grouped import GroupedExperts, reads

    readable = all(map(reads, layout.forms))
    return GroupedExperts(loader.num_experts, loader.top_k, loader.spec, device) if readable else None


def accelerator_for(device: torch.device | str | None, vram: int | None) -> Accelerator | None:
    """Where experts are kept beyond RAM; None where the processor computes, without `vram` to stand for a device's.

    Raises ConfigError for a device that is not here, and for `vram` without a device.
    """
    if device is None:
        if vram is not None:
            raise ConfigError('vram is memory of a device: say of which, such as device="cuda"')
        return None
    found = TorchAccelerator.named(str(device))
    return None if found.device.type == "cpu" and vram is None else found


def use_device(model: PreTrainedModel, accelerator: Accelerator, vram: int | None) -> None:
    """Move a model to a device, with `vram` bytes there for the experts that it reads from local files.

    `vram` None: what is free there, once the rest of the model is. Raises BudgetTooSmall.
    """
    model.to(accelerator.device)  # type: ignore[arg-type]  # a decorator of transformers hides the signature
    local = backend_of(model)
    if not isinstance(local, LocalExperts):
        return
    budget = default_vram_budget(accelerator.device) if vram is None else vram
    experts = DeviceExperts(local.loader, local.tier, accelerator, model.dtype, budget)
    local.tier.hold_stored(model.dtype, len(local.loader.manifest.experts), uploads=experts.takes_stored)
    attach_backend(model, experts)
