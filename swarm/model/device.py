"""Routed experts on an accelerator: a tier in its memory, over the RAM tier, over the disk.

What is resident there is computed there. Of what is not, a part is uploaded and waited for and the processor computes
the rest from RAM meanwhile (policy/offload.py): the same experts for the same rows either way, nothing left out. The
order in which outputs are added is eager's, so that on one device results equal those of `LocalExperts` bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from moehive.kernels.combine import add_token_row, combine_rows
from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.routing import group_by_expert, order_of_token
from moehive.protocol.errors import BudgetTooSmall, ManifestError, MemoryExhausted
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ModelFacts
from moehive.swarm.log import get_logger
from moehive.swarm.memory import default_vram_budget
from moehive.swarm.policy.budgets import least_ram
from moehive.swarm.policy.offload import Costs, uploads_to_await
from moehive.swarm.tiers.accelerator import Accelerator, TorchAccelerator
from moehive.swarm.tiers.device import UPLOADS, DeviceTier, Slot
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.stats import TierStats

from .backend import ExpertLoader, LocalExperts, WeightsTier, is_out_of_memory
from .seats import attach_backend, backend_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALIGNMENT: Final = 256  # bytes: a GPU's allocator's own
_PROCESSOR: Final = torch.device("cpu")
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where one expert's weights lie in a slot: `shapes` of gate_up, down and the biases, where there are any."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: ModelFacts, dtype: torch.dtype) -> ExpertLayout:
        """Of all experts of a model; they have one shape."""
        inner, hidden = model.intermediate_size, model.hidden_size
        gate_up, down = (2 * inner, hidden), (hidden, inner)
        matrices = (gate_up[::-1], down[::-1]) if model.ffn.transposed else (gate_up, down)
        return cls(dtype, (*matrices, (2 * inner,), (hidden,)) if model.ffn.bias else matrices)

    @property
    def nbytes(self) -> int:
        """Of a slot."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> Sequence[int]:
        exact = (prod(shape) * self.dtype.itemsize for shape in self.shapes)
        return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in exact]

    def view(self, memory: Tensor) -> ExpertWeights:
        """The weights in `memory`, uint8 [nbytes], as views of it."""
        parts = torch.split(memory, list(self._sizes))
        views = (
            part[: prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        )
        return ExpertWeights(*views)

    def write(self, weights: ExpertWeights, memory: Tensor) -> None:
        """Copy weights to `memory`, uint8 [nbytes]. Raises ManifestError for those of another shape."""
        found = tuple(tuple(tensor.shape) for tensor in weights.tensors)
        if found != self.shapes:
            raise ManifestError(f"an expert has the shapes {found}, the manifest says {self.shapes}")
        for target, source in zip(self.view(memory).tensors, weights.tensors, strict=True):
            target.copy_(source)


@dataclass(frozen=True, slots=True, eq=False)
class CallPlan:
    """Where the experts of one call of one layer are computed."""

    layer: int
    dtype: torch.dtype
    rows: Mapping[int, int]  # of each expert
    processor: frozenset[int]  # experts that the processor computes
    awaited: Sequence[int]  # experts that are uploaded for this call

    @property
    def order(self) -> Sequence[int]:
        """What is resident, what the processor computes while the device and its link are busy, what is to come."""
        late = frozenset(self.awaited)
        rank = {expert: (expert in late, expert in self.processor) for expert in self.rows}
        return sorted(self.rows, key=rank.__getitem__)


class DeviceExperts:
    """An ExpertsBackend for a model that is on `accelerator`, with `budget` bytes for experts there.

    Computes in `dtype`; calls in another are computed by the processor. Raises BudgetTooSmall where the budget holds
    less than a token's experts need, and names the least that works.
    """

    def __init__(
        self,
        loader: ExpertLoader,
        ram: WeightsTier,
        accelerator: Accelerator,
        dtype: torch.dtype,
        budget: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        manifest = loader.manifest
        self._num_experts = loader.num_experts
        self._spec = loader.spec
        self._layout = ExpertLayout.of(manifest.model, dtype)
        slot, everything = self._layout.nbytes, len(manifest.experts) * self._layout.nbytes
        needed = min(least_ram(slot, loader.top_k), everything)
        if budget < needed:
            what = f"{accelerator.device} memory for experts of {manifest.model.name}"
            raise BudgetTooSmall(what, budget=budget, needed=needed)
        self.tier: DeviceTier[ExpertKey] = DeviceTier(
            accelerator,
            min(budget, everything),
            slot,
            self._pack,
            place=lambda key: (key.layer, key.expert),
            top_k=loader.top_k,
            out_of_memory=is_out_of_memory,
        )
        self.ram = ram
        self.costs = Costs()
        self._views: dict[int, ExpertWeights] = {}  # by slot
        self._clock = clock

    def close(self) -> None:
        """End the threads of both tiers."""
        self.tier.close()
        self.ram.close()

    @property
    def tier_stats(self) -> TierStats:
        """Of the RAM tier; a use of it is a miss of the device's tier."""
        return self.ram.stats

    @property
    def device_stats(self) -> TierStats:
        """Of the tier in device memory."""
        return self.tier.stats

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ExpertsBackend. Raises what `ExpertLoader.load` and RamTier.lease raise."""
        out = torch.zeros_like(hidden)  # [T, H]
        chosen = top_k_index.to(_PROCESSOR)
        if hidden.shape[0] == 1:
            order = order_of_token(chosen, self._num_experts)
            plan = self.plan(layer, {expert: 1 for expert, _ in order}, 1, hidden.dtype)
            inputs = _Inputs(hidden, plan)
            rows = {expert: self._rows(plan, expert, inputs) for expert in plan.order}
            for expert, position in order:
                add_token_row(out, rows[expert], position, top_k_weights)
            return out
        groups = group_by_expert(chosen, self._num_experts)
        counts = {group.expert: group.token.shape[0] for group in groups}
        plan = self.plan(layer, counts, hidden.shape[0], hidden.dtype)
        inputs = _Inputs(hidden, plan)
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
        self._note_ram(layer, {key.expert: uses.rows[key] for key in missing}, tokens, dtype)
        order = sorted(missing, key=lambda key: -uses.rows[key])
        coming = self.tier.begin(layer, order[:UPLOADS] if tokens == 1 else order)
        order = [*coming, *(key for key in order if key not in coming)]
        # One token's calls are short: what did not find a thread or a slot at once would come too late.
        most = len(coming) if tokens == 1 else len(order)
        count = uploads_to_await([uses.rows[key] for key in order], self.costs_now, most)
        self.tier.spare(layer, [key for key in uses.rows if key not in order[count:]])
        processor = frozenset(key.expert for key in order[count:])
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
            slot = None if expert in plan.processor else self._enter(stack, key)
            if slot is not None:
                weights = self._views.get(slot.index)
                if weights is None:
                    weights = self._views[slot.index] = self._layout.view(slot.memory)
                yield weights
                return
            weights = stack.enter_context(self.ram.lease((key, plan.dtype)))
            started = self._clock()
            yield weights
            self.costs = self.costs.measured(min(plan.rows[expert], most_rows), self._clock() - started)

    def _enter(self, stack: ExitStack, key: ExpertKey) -> Slot | None:
        """A leased slot; None where the device has no memory for it, or too much is in use: the processor can do it."""
        try:
            return stack.enter_context(self.tier.lease(key))
        except (BudgetTooSmall, MemoryExhausted) as error:
            _log.warning("an expert finds no room in device memory; the processor computes it", reason=str(error))
            return None

    # --- parts ----------------------------------------------------------------------------------------------------

    def _ahead(self, plan: CallPlan, expert: int, inputs: _Inputs, token: Tensor) -> Tensor:
        """`_rows`, after uploads for the next experts began."""
        later = [other for other in plan.awaited if other > expert][:UPLOADS]
        if later:
            self.tier.begin(plan.layer, [ExpertKey(plan.layer, other) for other in later])
        return self._rows(plan, expert, inputs, token)

    def _rows(self, plan: CallPlan, expert: int, inputs: _Inputs, token: Tensor | None = None) -> Tensor:
        """Unweighted output [R, H] for the rows `token` [R] of the call, or all, on the call's device."""
        with self.lease(plan, expert) as weights:
            rows = inputs.on(weights.gate_up.device)
            if token is not None:
                rows = rows.index_select(0, token.to(rows.device))  # [R, H]
            return expert_ffn(rows, weights, self._spec).to(inputs.device)

    def _note_ram(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> None:
        self.ram.note(Uses(layer, {(ExpertKey(layer, expert), dtype): n for expert, n in rows.items()}, tokens))

    def _pack(self, key: ExpertKey, memory: Tensor) -> None:
        with self.ram.lease((key, self._layout.dtype)) as weights:
            self._layout.write(weights, memory)


class _Inputs:
    """A call's hidden states [T, H] where they are needed. Brought to the processor before the device is kept busy."""

    def __init__(self, hidden: Tensor, plan: CallPlan) -> None:
        self.device = hidden.device
        self._there = {hidden.device: hidden}
        if plan.processor:
            self.on(_PROCESSOR)

    def on(self, device: torch.device) -> Tensor:
        """On `device`."""
        found = self._there.get(device)
        if found is None:
            found = self._there[device] = self._there[self.device].to(device)
        return found


def use_device(model: PreTrainedModel, device: torch.device, vram: int | None) -> None:
    """Move a model to `device`, with `vram` bytes there for the experts that it reads from local files.

    `vram` None: what is free there, once the rest of the model is; on the processor, nothing. Raises BudgetTooSmall.
    """
    model.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides the signature
    local, placed = backend_of(model), next(model.parameters()).device  # with its index
    if not isinstance(local, LocalExperts) or (placed.type == "cpu" and vram is None):
        return
    budget = default_vram_budget(placed) if vram is None else vram
    loader = local.loader
    attach_backend(model, DeviceExperts(loader, local.tier, TorchAccelerator(placed), model.dtype, budget))
