"""The weighted sum over the experts of one call: those on an accelerator there, the processor's here meanwhile.

Sums are fp32. The experts on the device are added up in one order, the processor's in another, so the last bits depend
on what was where; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moehive.kernels.combine import add_weighted
from moehive.kernels.cpu.experts import expert_rows_fast
from moehive.kernels.expert_ffn import expert_ffn
from moehive.kernels.formats import ExpertMatrices
from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.device import Slot

from .device_call import PROCESSOR, CallInputs, CallPlan, WeightedRows

if TYPE_CHECKING:
    from .device import DeviceExperts


class DeviceSums:
    """One call, as `experts` planned it."""

    def __init__(self, experts: DeviceExperts, plan: CallPlan, hidden: Tensor) -> None:
        self._experts = experts
        self._plan = plan
        self._inputs = CallInputs(hidden, plan)
        self._shape = hidden.shape
        self._there: Tensor | None = None  # [T, H] fp32 on the device, once something was added
        self._here: Tensor | None = None  # [T, H] fp32 in host memory

    def add(self, groups: Sequence[WeightedRows], total: Tensor, slice_rows: int) -> Iterator[int]:
        """See DeviceExperts.add_sums."""
        processor = self._plan.processor
        late = self._add_resident([group for group in groups if group.expert not in processor])
        yield sum(
            group.token.shape[0] for group in groups if group.expert not in processor | {one.expert for one in late}
        )
        for group in groups:
            if group.expert in processor:
                yield from self._add_here(group, slice_rows)
        for number, group in enumerate(late):
            self._experts.begin_next(self._plan, [one.expert for one in late[number + 1 :]])
            yield from self._add_late(group, slice_rows)
        for part in (self._there, self._here):
            if part is not None:
                total += part.to(total.device)

    def _add_resident(self, groups: Sequence[WeightedRows]) -> Sequence[WeightedRows]:
        """Add what is on the device now, all at once; what is not."""
        with ExitStack() as leases:
            slots: dict[int, Slot] = {}
            for group in groups:
                lease = self._experts.tier.try_lease(ExpertKey(self._plan.layer, group.expert))
                if lease is not None:
                    slots[group.expert] = leases.enter_context(lease)
            self._add_slots([group for group in groups if group.expert in slots], slots)
        return [group for group in groups if group.expert not in slots]

    def _add_late(self, group: WeightedRows, slice_rows: int) -> Iterator[int]:
        """Add what is uploaded for this call, or what the processor has to compute after all."""
        with ExitStack() as leases:
            slot = self._experts.enter(leases, ExpertKey(self._plan.layer, group.expert))
            if slot is not None:
                self._add_slots([group], {group.expert: slot})
        if slot is None:
            yield from self._add_here(group, slice_rows)
        else:
            yield group.token.shape[0]

    def _add_slots(self, groups: Sequence[WeightedRows], slots: Mapping[int, Slot]) -> None:
        """Add experts whose slots are leased."""
        if not groups:
            return
        experts = self._experts
        hidden = self._inputs.on(experts.device)
        if experts.grouped is not None:
            for form in sorted({experts.form_of(self._key(group)) for group in groups}):
                alike = [group for group in groups if experts.form_of(self._key(group)) == form]
                views = {group.expert: self._view(group, slots[group.expert]) for group in alike}
                found = experts.grouped.sum(self._plan.layer, form, hidden, alike, views)
                self._there = found if self._there is None else self._there.add_(found)
            return
        if self._there is None:
            self._there = torch.zeros(self._shape, dtype=torch.float32, device=experts.device)
        for group in groups:
            token, weight = group.token.to(experts.device), group.weight.to(experts.device)
            weights = experts.weights_in(slots[group.expert], self._key(group))
            add_weighted(self._there, token, expert_ffn(hidden[token], weights, experts.spec), weight)

    def _view(self, group: WeightedRows, slot: Slot) -> tuple[int, ExpertMatrices]:
        return slot.index, self._experts.matrices_in(slot, self._key(group))

    def _key(self, group: WeightedRows) -> ExpertKey:
        return ExpertKey(self._plan.layer, group.expert)

    def _add_here(self, group: WeightedRows, slice_rows: int) -> Iterator[int]:
        """Add with the processor, no more rows at a time than `slice_rows`."""
        hidden, experts = self._inputs.on(PROCESSOR), self._experts
        if self._here is None:
            self._here = torch.zeros(self._shape, dtype=torch.float32)
        slices = zip(torch.split(group.token, slice_rows), torch.split(group.weight, slice_rows), strict=True)
        for token, weight in slices:
            with experts.lease_here(self._plan, group.expert, token.shape[0]) as weights:
                add_weighted(self._here, token, expert_rows_fast(hidden[token], weights, experts.spec), weight)
            yield token.shape[0]
