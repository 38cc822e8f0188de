"""The mathematics of a batch of requests for one layer: each expert's weights are used once for all of them.

`sum` requests are merged: one matrix product per expert over everybody's rows. `rows` requests are computed one by one,
because their callers rely on the product over just their rows (transformers' bits).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, starmap

import torch
from torch import Tensor

from moehive.kernels.combine import add_weighted
from moehive.kernels.cpu.experts import expert_rows_fast
from moehive.kernels.cpu.packed import plain_weights
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.protocol.messages import RunExperts
from moehive.swarm.dispatch.request import parse_request
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.device_call import WeightedRows

# (layer, expert, dtype) -> the weights, held while the context lasts
LeaseExpert = Callable[[int, int, torch.dtype], AbstractContextManager[ExpertWeights]]

# (layer, rows by expert, tokens, dtype): what a batch is about to lease
NoteUses = Callable[[int, Mapping[int, int], int, torch.dtype], None]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One request, as tensors."""

    message: RunExperts
    hidden: Tensor  # [T, H]
    token: Tensor  # [R] int64: rows of the experts in the order of the message
    weights: Tensor | None  # [R], sum form

    @classmethod
    def parse(cls, message: RunExperts, payload: bytearray) -> Work:
        """Read a payload that `message.check` accepted. Raises ValueError for an index outside it."""
        hidden, token, weights = parse_request(message, payload)
        return cls(message, hidden, token, weights)

    @property
    def merges(self) -> bool:
        """Whether the request may be computed together with others."""
        return self.message.form == "sum"


class BatchRun:
    """Requests of one layer and dtype, computed a slice at a time: so that others can have their turn in between."""

    def __init__(
        self,
        batch: Sequence[Work],
        lease: LeaseExpert,
        spec: FfnSpec,
        *,
        slice_rows: int = 1 << 30,
        note: NoteUses | None = None,
        device: DeviceExperts | None = None,
    ) -> None:
        self._batch = batch
        self._lease = lease
        self._spec = spec
        self._slice_rows = slice_rows
        self._note = note
        self._device = device  # computes where it is given, instead of what `lease` gives
        self._outputs: dict[int, Tensor] = {}  # by the index in the batch
        self._steps = self._compute()

    def advance(self) -> bool:
        """Compute one slice; whether that was the last. Raises what `lease` raises."""
        rows = 0
        for step in self._steps:
            rows += step
            if rows >= self._slice_rows:
                return False
        return True

    @property
    def outputs(self) -> list[Tensor]:
        """The answers in the order of the batch, once it is done."""
        return [self._outputs[index] for index in range(len(self._batch))]

    def _compute(self) -> Iterator[int]:
        """Yields, after each product, the number of its rows."""
        merged = [index for index, work in enumerate(self._batch) if work.merges]
        if merged:
            self._tell([self._batch[index] for index in merged])
            yield from self._merged(merged)
        for index, work in enumerate(self._batch):
            if not work.merges:
                self._tell([work])
                yield from self._rows(index, work)

    def _tell(self, works: Sequence[Work]) -> None:
        """Say what is used next, all at once: so that it can be got ready, and the rest be judged by it."""
        if self._note is None or self._device is not None:  # which is told when it plans
            return
        first, tokens = works[0], sum(work.message.tokens for work in works)
        rows: Mapping[int, int] = dict(zip(first.message.experts, first.message.counts, strict=True))  # ascending
        if len(works) > 1:
            counted = Counter(rows)
            for work in works[1:]:
                counted.update(dict(zip(work.message.experts, work.message.counts, strict=True)))
            rows = dict(sorted(counted.items()))
        self._note(first.message.layer, rows, tokens, first.hidden.dtype)

    def _rows(self, index: int, work: Work) -> Iterator[int]:
        """Unweighted expert outputs [R, H]: each expert's rows in one product, as its caller relies on."""
        message, dtype = work.message, work.hidden.dtype
        out = self._outputs[index] = torch.empty(message.rows, message.hidden, dtype=dtype)  # [R, H]
        if self._device is not None:
            yield from self._rows_on(self._device, work, out)
            return
        start = 0
        for expert, count in zip(message.experts, message.counts, strict=True):
            token = work.token[start : start + count]
            with self._lease(message.layer, expert, dtype) as weights:
                rows = work.hidden.index_select(0, token)  # [n, H]
                out[start : start + count] = expert_ffn(rows, plain_weights(weights), self._spec)
                del weights  # they are not counted after their lease, and other work may come before this goes on
            start += count
            yield count

    def _rows_on(self, device: DeviceExperts, work: Work, out: Tensor) -> Iterator[int]:
        """The same into out [R, H], each expert where the device's plan says."""
        message = work.message
        counts = dict(zip(message.experts, message.counts, strict=True))
        first = dict(zip(message.experts, accumulate(message.counts, initial=0), strict=False))
        plan = device.plan(message.layer, counts, message.tokens, out.dtype)
        for expert in plan.order:
            span = slice(first[expert], first[expert] + counts[expert])
            with device.lease(plan, expert) as weights:
                rows = work.hidden[work.token[span]].to(weights.gate_up.device)
                out[span] = expert_ffn(rows, weights, self._spec).to(out.device)
            yield counts[expert]

    def _merged(self, merged: Sequence[int]) -> Iterator[int]:
        """Weighted sums, [T, H] of each request: accumulated in fp32 in ascending expert order, rounded once."""
        batch = [self._batch[index] for index in merged]
        tokens = [work.message.tokens for work in batch]
        if tokens == [1] and self._device is None:
            self._outputs[merged[0]] = _run_token(batch[0], self._lease, self._spec)
            yield batch[0].message.rows
            return
        layer, dtype = batch[0].message.layer, batch[0].hidden.dtype
        hidden = batch[0].hidden if len(batch) == 1 else torch.cat([work.hidden for work in batch])  # [sum T, H]
        total = torch.zeros(hidden.shape, dtype=torch.float32)  # [sum T, H]
        groups = _rows_by_expert(batch, tokens)
        if self._device is None:
            yield from self._add_sums(layer, hidden, groups, total)
        else:
            yield from self._device.add_sums(layer, hidden, list(groups), total, slice_rows=self._slice_rows)
        self._outputs |= zip(merged, torch.split(total.to(dtype), tokens), strict=True)

    def _add_sums(self, layer: int, hidden: Tensor, groups: Iterable[WeightedRows], total: Tensor) -> Iterator[int]:
        """Add the weighted rows of hidden [T, H] to total [T, H] fp32."""
        for group in groups:
            for part, weight in self._slices(group.token, group.weight):
                with self._lease(layer, group.expert, hidden.dtype) as weights:
                    rows = expert_rows_fast(hidden.index_select(0, part), weights, self._spec)  # [R, H]
                    add_weighted(total, part, rows, weight)
                    del weights
                yield part.shape[0]

    def _slices(self, token: Tensor, row_weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """One expert's rows, cut where there are more than a slice has."""
        if token.shape[0] <= self._slice_rows:
            return ((token, row_weights),)
        return zip(torch.split(token, self._slice_rows), torch.split(row_weights, self._slice_rows), strict=True)


def run_batch(batch: Sequence[Work], lease: LeaseExpert, spec: FfnSpec) -> list[Tensor]:
    """The answers to requests of one layer and dtype, in the order of `batch`. Raises what `lease` raises."""
    run = BatchRun(batch, lease, spec)
    run.advance()
    return run.outputs


def _run_token(work: Work, lease: LeaseExpert, spec: FfnSpec) -> Tensor:
    """The weighted sum for one token, [1, H]: without index tensors, which would cost more than the sum."""
    assert work.weights is not None
    total = torch.zeros(work.hidden.shape, dtype=torch.float32)  # [1, H]
    for expert, weight in zip(work.message.experts, work.weights.tolist(), strict=True):
        with lease(work.message.layer, expert, work.hidden.dtype) as weights:
            total.add_(expert_rows_fast(work.hidden, weights, spec), alpha=weight)  # in fp32, without a copy of the row
            del weights
    return total.to(work.hidden.dtype)


def _rows_by_expert(batch: Sequence[Work], tokens: Sequence[int]) -> Iterator[WeightedRows]:
    """Each expert, ascending: tokens are those of the merged batch, weights fp32."""
    starts = accumulate(tokens, initial=0)
    token = torch.cat([work.token + start for work, start in zip(batch, starts, strict=False)])  # [sum R]
    row_weights = torch.cat([work.weights.float() for work in batch if work.weights is not None])  # [sum R]
    experts = torch.tensor([expert for work in batch for expert in work.message.experts])
    counts = torch.tensor([count for work in batch for count in work.message.counts])
    expert, order = torch.sort(experts.repeat_interleave(counts), stable=True)  # [sum R]
    found, sizes = torch.unique_consecutive(expert, return_counts=True)
    parts = sizes.tolist()
    rows = zip(found.tolist(), torch.split(token[order], parts), torch.split(row_weights[order], parts), strict=True)
    yield from starmap(WeightedRows, rows)
