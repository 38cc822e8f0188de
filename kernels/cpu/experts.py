"""The experts of one layer on the rows routed to them: one product per projection and active expert, on just its rows.

What is not a product is done for all experts at once. Experts in fp32 or bf16 as transformers computes them
(`ExpertWeights`) give the bits of transformers' eager experts; those in another form (`ExpertMatrices`,
`PackedExpert`) are computed in the fastest way and agree within rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from moehive.kernels.combine import add_all_choices, add_weighted
from moehive.kernels.expert_ffn import CONCATENATED, ExpertWeights, FfnSpec, apply_gate, expert_ffn
from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.routing import SortedRows, sort_rows

from .packed import PackedExpert, is_packed, packed_expert
from .plain import is_plain_fastest
from .products import multiply

Expert: TypeAlias = ExpertWeights | ExpertMatrices | PackedExpert

_AT_ONCE: Final = 1 << 24  # elements of the widest matrix between two projections
_ALIGNMENT: Final = 64  # bytes: torch's own for new tensors
_SERIAL: Final = 32768  # elements up to which torch computes elementwise in one thread (at::internal::GRAIN_SIZE)
_BY_ROWS: Final = ("silu", "swish", "relu", "relu2")
_VECTORS: Final = 64  # elements: a row of whole vectors of every dtype, as torch's loops take them two at a time


@torch.no_grad()
def run_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: Sequence[Expert | None],
    spec: FfnSpec,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of each token's experts times their weights: [T, H] of `dtype` (that of `hidden` by default).

    hidden [T, H] floating; top_k_index [T, k] integers, where len(experts) marks a choice that is left out;
    top_k_weights [T, k] floating. Experts that are None add nothing: what a peer computes for another is the part of
    the sum that it holds. The same as `kernels.gpu.experts.run_experts`, on the processor.

    Sums are fp32 in ascending order of the experts. Without gradients. Raises ValueError for an
    index outside [0, len(experts)].
    """
    rows = sort_rows(top_k_index, len(experts))
    if any(expert is None for expert in experts):
        rows = _only(rows, experts)
    used = [expert for number in rows.experts if (expert := experts[number]) is not None]
    total = torch.zeros(hidden.shape, dtype=torch.float32)  # [T, H]
    for part, outputs in expert_outputs(hidden, rows, (used,), spec):
        add = add_all_choices if part.token.shape[0] == top_k_index.numel() else add_weighted
        add(total, part.token, outputs, top_k_weights[part.token, part.position])
    return total.to(hidden.dtype if dtype is None else dtype)


def expert_outputs(
    hidden: Tensor, rows: SortedRows, runs: Iterable[Sequence[Expert]], spec: FfnSpec
) -> Iterator[tuple[SortedRows, Tensor]]:
    """The experts' unweighted outputs for all `rows` of hidden [T, H], in order and by parts: (rows, outputs [n, H]).

    `runs` are the experts of `rows`, in order, several at a time: all that are in memory, and after each run the next,
    which is asked for when nothing of the last is in use any more. A part is no more than is worth holding at a time;
    the rows of one expert are never cut.
    """
    first = start = 0
    for run in runs:
        for some in _parts(rows.counts[first : first + len(run)], _rows_at_once(hidden, run)):
            experts, counts = run[some], rows.counts[first : first + len(run)][some]
            stop = start + sum(counts)
            part = rows.part(slice(first + some.start, first + some.stop), slice(start, stop))
            yield part, expert_rows(hidden.index_select(0, part.token), counts, experts, spec)
            start = stop
        first += len(run)
    assert first == len(rows.experts), f"{first} experts were given for the rows of {len(rows.experts)}"


def _rows_at_once(hidden: Tensor, run: Sequence[Expert]) -> int:
    widest = max(hidden.shape[1], *run[0].gate_up.shape) if run else 1
    return max(_AT_ONCE // widest, 1)


def _parts(counts: Sequence[int], limit: int) -> Iterator[slice]:
    """Cuts into parts whose counts sum up to `limit` at most, or that are one count."""
    first, total = 0, 0
    for index, count in enumerate(counts):
        if total + count > limit and index > first:
            yield slice(first, index)
            first, total = index, 0
        total += count
    if first < len(counts):
        yield slice(first, len(counts))


def expert_rows(rows: Tensor, counts: Sequence[int], experts: Sequence[Expert], spec: FfnSpec) -> Tensor:
    """Unweighted outputs [S, H] of several experts: rows [S, H] has counts[i] rows for experts[i], in order.

    For `ExpertWeights` they are bit for bit those of `expert_ffn` on each expert's rows alone.
    """
    sizes, first = list(counts), experts[0]
    exact = isinstance(first, ExpertWeights)
    doubled = first.gate_up.shape[1 if exact and spec.transposed else 0]
    if exact and (_gradients(rows) or not _same_bits(rows, doubled // 2, spec)):
        return _one_by_one(rows, sizes, experts, spec)
    gate_up = rows.new_empty(rows.shape[0], doubled)  # [S, 2I]
    for expert, x, out in zip(experts, torch.split(rows, sizes), torch.split(gate_up, sizes), strict=True):
        _project(x, expert, spec, out, down=False)
    inner = apply_gate(gate_up, spec)  # [S, I]
    outputs = torch.empty_like(rows)
    for expert, x, out in zip(experts, torch.split(inner, sizes), torch.split(outputs, sizes), strict=True):
        _project(x, expert, spec, out, down=True)
    return outputs


@torch.no_grad()
def expert_rows_fast(rows: Tensor, weights: ExpertWeights, spec: FfnSpec) -> Tensor:
    """`expert_ffn` within rounding, [R, H], in the fastest way: for sums, whose callers do not rely on its bits.

    Also of what `packed.pack_weights` made. Without gradients.
    """
    if is_packed(weights):
        return expert_rows(rows, [rows.shape[0]], [packed_expert(weights)], spec)
    plain = (weight.t() if spec.transposed else weight for weight in (weights.gate_up, weights.down))
    if all(is_plain_fastest(rows, weight) for weight in plain):
        return expert_ffn(rows, weights, spec)
    return expert_rows(rows, [rows.shape[0]], [weights.matrices(spec)], spec)


def _gradients(rows: Tensor) -> bool:
    return rows.requires_grad and torch.is_grad_enabled()


def _project(x: Tensor, expert: Expert, spec: FfnSpec, out: Tensor, *, down: bool) -> None:
    matrix = expert.down if down else expert.gate_up
    bias = expert.down_bias if down else expert.gate_up_bias
    if not isinstance(matrix, Tensor):
        multiply(x, matrix, bias, out)
        return
    torch.mm(x, matrix if spec.transposed else matrix.t(), out=out)
    if bias is not None:
        out.add_(bias)


def _same_bits(rows: Tensor, inner: int, spec: FfnSpec) -> bool:
    """Whether computing experts together cannot show.

    Products round by the alignment of their rows, so each expert's must begin where a tensor of its own would. What is
    elementwise may round differently in the last vector of a loop, so loops must end where they would for one expert:
    with each row (gate and up are strided halves of a row; interleaved ones are gathered into one long row first), and
    not where torch divides work among threads. gelu is computed by another library where there is a single row.
    """
    total, item = rows.shape[0], rows.element_size()
    aligned = not any(width * item % _ALIGNMENT for width in (rows.shape[1], 2 * inner, inner))
    serial = torch.get_num_threads() == 1 or total * inner < _SERIAL
    by_rows = spec.activation in _BY_ROWS if spec.gate == CONCATENATED else inner % _VECTORS == 0
    return aligned and serial and by_rows


def _one_by_one(rows: Tensor, sizes: Sequence[int], experts: Sequence[Expert], spec: FfnSpec) -> Tensor:
    outputs = []
    for expert, x in zip(experts, torch.split(rows, list(sizes)), strict=True):
        assert isinstance(expert, ExpertWeights), "experts of one call have one form"
        outputs.append(expert_ffn(x.clone(), expert, spec))  # a tensor of its own, aligned as eager's
    return torch.cat(outputs)


def _only(rows: SortedRows, experts: Sequence[Expert | None]) -> SortedRows:
    """Without the rows of experts that are not there."""
    used = list(zip(rows.experts, rows.counts, strict=True))
    here = [expert is not None for expert in (experts[number] for number, _ in used)]
    keep = torch.tensor(here, dtype=torch.bool).repeat_interleave(
        torch.tensor([count for _, count in used], dtype=torch.int64)
    )
    kept = [pair for pair, there in zip(used, here, strict=True) if there]
    return SortedRows(
        [expert for expert, _ in kept], [count for _, count in kept], rows.token[keep], rows.position[keep]
    )
