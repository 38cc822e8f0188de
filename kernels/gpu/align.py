"""Rows to experts on the GPU: a stable counting sort whose groups are padded to whole blocks.

A row is one choice of one token, r = token * K + position. Three ways, by the number of rows: none at all for so few
that most experts have one row or none (every row gets a block of its own), one program that sorts in registers, and
three kernels (count, prefix, scatter) for many. All give every row the same place at every run: there are no atomics
whose order could show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_ONE_PROGRAM = 512  # rows; beyond, one program would spill registers
_CHUNK = 512  # rows of one program of the split path
_FEW = 4  # a block per row where this many times the rows are no more than the experts (vLLM's rule)
_TILE = 4096  # elements of a tile of counts [chunks, experts]


@dataclass(frozen=True, slots=True, eq=False)
class AlignedRows:
    """Rows in the order of their experts, in blocks that each belong to one expert.

    rows: [P] int32, padding is T * K. Within an expert rows ascend.
    block_expert: [P / block] int32, the local expert of each block; -1: leave the block out.
    count: [1] int32, how much of `rows` is in use, a multiple of `block`. What stands beyond it is undefined.
    block: rows of one block.
    """

    rows: Tensor
    block_expert: Tensor
    count: Tensor
    block: int

    @property
    def max_blocks(self) -> int:
        """Blocks at most, known without asking the GPU."""
        return self.block_expert.shape[0]


@triton.jit
def local_expert(experts, expert_map, row, inside, E: tl.constexpr, HAS_MAP: tl.constexpr):
    """The local expert of each row; -1 where the choice was dropped (id E) or the expert is elsewhere."""
    expert = tl.load(experts + row, mask=inside, other=E).to(tl.int32)
    inside = inside & (expert >= 0) & (expert < E)
    if HAS_MAP:
        return tl.load(expert_map + expert, mask=inside, other=-1)
    return tl.where(inside, expert, -1)


@triton.jit
def sort_rows(expert, EP: tl.constexpr, ROWS: tl.constexpr):
    """expert [ROWS], -1 for rows that are left out: (size of each expert [EP], then expert and index in their order).

    The sort is stable, and rows that are left out come last, as expert EP.
    """
    expert = tl.where(expert < 0, EP, expert)
    size = tl.histogram(expert, EP, mask=expert < EP)
    ordered = tl.sort((expert * ROWS) | tl.arange(0, ROWS))
    return size, ordered // ROWS, ordered % ROWS


@triton.jit
def places(start, size, expert, EP: tl.constexpr, ROWS: tl.constexpr):
    """Where sorted rows go, [ROWS]: each expert's begin at start [EP], in the order in which they are sorted."""
    shift = start - (tl.cumsum(size, 0) - size)
    return tl.gather(shift, tl.minimum(expert, EP - 1), 0) + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=["num_rows"])
def local_experts_kernel(experts, expert_map, block_expert, usage, num_rows, E: tl.constexpr, HAS_MAP: tl.constexpr,
                         HAS_USAGE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """block_expert [R]: of each row, for blocks of one row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    expert = local_expert(experts, expert_map, row, inside, E, HAS_MAP)
    tl.store(block_expert + row, expert, mask=inside)
    if HAS_USAGE:
        tl.atomic_add(usage + expert, tl.full((BLOCK,), 1, tl.int64), mask=expert >= 0, sem="relaxed")  # of integers


@triton.jit
def add_usage(usage, size, E: tl.constexpr, EP: tl.constexpr, HAS_USAGE: tl.constexpr):
    """usage [E] int64 grows by size [EP]. Called by one program of a launch; launches of a stream follow each other."""
    if HAS_USAGE:
        local = tl.arange(0, EP)
        before = tl.load(usage + local, mask=local < E, other=0)
        tl.store(usage + local, before + size, mask=local < E)


@triton.jit
def store_padding(rows, start, size, padded, pad, BM: tl.constexpr, STEP: tl.constexpr):
    """What remains of each expert's last block, [start + size, start + padded)."""
    for first in range(0, BM, STEP):
        place = size[:, None] + first + tl.arange(0, STEP)[None, :]  # [EP, STEP]
        value = tl.zeros_like(place) + pad
        tl.store(rows + start[:, None] + place, value, mask=place < padded[:, None])


@triton.jit
def store_block_experts(block_expert, start, padded, first_block, local, BM: tl.constexpr, BLOCKS: tl.constexpr):
    """The expert of the BLOCKS blocks from `first_block`; start, padded, local: [EP]."""
    block = first_block + tl.arange(0, BLOCKS)
    at = block[None, :] * BM
    owner = (at >= start[:, None]) & (at < (start + padded)[:, None])  # [EP, BLOCKS]; at most one expert for each
    expert = tl.max(tl.where(owner, local[:, None], -1), 0)
    tl.store(block_expert + block, expert, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_rows"])
def align_kernel(experts, expert_map, rows, block_expert, count, usage, num_rows, E: tl.constexpr,
                 HAS_MAP: tl.constexpr, HAS_USAGE: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
                 BM: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """All of it in one program, for at most ROWS rows. EP: E's power of two."""
    row = tl.arange(0, ROWS)
    size, expert, row = sort_rows(local_expert(experts, expert_map, row, row < num_rows, E, HAS_MAP), EP, ROWS)
    padded = (size + BM - 1) // BM * BM
    start = tl.cumsum(padded, 0) - padded
    tl.store(rows + places(start, size, expert, EP, ROWS), row, mask=expert < EP)
    local = tl.arange(0, EP)
    store_padding(rows, start, size, padded, num_rows, BM, STEP)
    for first_block in range(0, tl.sum(padded, 0) // BM, BLOCKS):
        store_block_experts(block_expert, start, padded, first_block, local, BM, BLOCKS)
    tl.store(count, tl.sum(padded, 0))
    add_usage(usage, size, E, EP, HAS_USAGE)


@triton.jit(do_not_specialize=["num_rows"])
def count_kernel(experts, expert_map, counts, num_rows, E: tl.constexpr, HAS_MAP: tl.constexpr, EP: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """counts [chunks, EP]: rows of each expert in each chunk of ROWS."""
    chunk = tl.program_id(0)
    row = chunk * ROWS + tl.arange(0, ROWS)
    expert = local_expert(experts, expert_map, row, row < num_rows, E, HAS_MAP)
    tl.store(counts + chunk * EP + tl.arange(0, EP), tl.histogram(expert, EP, mask=expert >= 0))


@triton.jit(do_not_specialize=["chunks", "num_rows"])
def prefix_kernel(counts, starts, rows, count, usage, chunks, num_rows, E: tl.constexpr, HAS_USAGE: tl.constexpr,
                  EP: tl.constexpr, CHUNKS: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """counts [chunks, EP] become the rows of each expert in earlier chunks; starts [2, EP]: place, padded size.

    One program. Also writes the padding and the number of rows with it.
    """
    local = tl.arange(0, EP)
    size = tl.zeros((1, EP), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[:, None]
        at = counts + chunk * EP + local[None, :]
        here = tl.load(at, mask=chunk < chunks, other=0)  # [CHUNKS, EP]
        tl.store(at, tl.cumsum(here, 0) - here + size, mask=chunk < chunks)
        size += tl.sum(here, 0)[None, :]
    total = tl.reshape(size, (EP,))
    padded = (total + BM - 1) // BM * BM
    start = tl.cumsum(padded, 0) - padded
    tl.store(starts + local, start)
    tl.store(starts + EP + local, padded)
    store_padding(rows, start, total, padded, num_rows, BM, STEP)
    tl.store(count, tl.sum(padded, 0))
    add_usage(usage, total, E, EP, HAS_USAGE)


@triton.jit(do_not_specialize=["num_rows"])
def scatter_kernel(experts, expert_map, counts, starts, rows, block_expert, num_rows, E: tl.constexpr,
                   HAS_MAP: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
                   BLOCKS: tl.constexpr):  # fmt: skip
    """Each chunk's rows to their places, and the experts of the chunk's share of the blocks."""
    chunk = tl.program_id(0)
    local = tl.arange(0, EP)
    start = tl.load(starts + local)
    row = chunk * ROWS + tl.arange(0, ROWS)
    size, expert, index = sort_rows(local_expert(experts, expert_map, row, row < num_rows, E, HAS_MAP), EP, ROWS)
    place = places(start + tl.load(counts + chunk * EP + local), size, expert, EP, ROWS)
    tl.store(rows + place, chunk * ROWS + index, mask=expert < EP)
    store_block_experts(block_expert, start, tl.load(starts + EP + local), chunk * BLOCKS, local, BM, BLOCKS)


def align_rows(
    experts: Tensor,
    num_experts: int,
    block: int,
    expert_map: Tensor | None = None,
    usage: Tensor | None = None,
) -> AlignedRows:
    """Sort the choices `experts` [T, K] (int32 or int64, global ids) by local expert, in blocks of `block` rows.

    The id `num_experts` marks a choice that was dropped. `expert_map` [E] int32 gives the local index of each expert,
    -1 for one that is not here; without it all are, under their own id. `usage` [E] int64, where given, grows by the
    rows of each local expert: telemetry without a launch of its own. `block` is a power of two. Raises ValueError for
    another.
    """
    if block < 1 or block & (block - 1):
        raise ValueError(f"blocks of {block} rows, not a power of two")
    experts = experts.reshape(-1)  # [R]
    if _FEW * experts.shape[0] <= num_experts:
        return block_per_row(experts, num_experts, block, expert_map, usage)
    launch = _align_at_once if experts.shape[0] <= _ONE_PROGRAM else _align_in_chunks
    return launch(experts, num_experts, block, expert_map, usage)


def max_blocks(num_rows: int, num_experts: int, block: int) -> int:
    """Blocks that `num_rows` rows of `num_experts` experts need at most: each expert has one that is not full."""
    lone = min(num_rows, num_experts)
    return lone + (num_rows - lone) // block


def block_per_row(
    experts: Tensor, num_experts: int, block: int, expert_map: Tensor | None, usage: Tensor | None
) -> AlignedRows:
    """Every row in a block of its own, in the order of the rows; nothing is sorted. experts: [R]."""
    num_rows = experts.shape[0]
    rows, count = _lone_rows(num_rows, block, experts.device)
    block_expert = torch.empty(num_rows, dtype=torch.int32, device=experts.device)  # [R]
    if num_rows:
        local_experts_kernel[(triton.cdiv(num_rows, 128),)](
            experts, expert_map, block_expert, usage, num_rows,
            num_experts, expert_map is not None, usage is not None, 128, num_warps=1,
        )  # fmt: skip
    return AlignedRows(rows, block_expert, count, block)


@lru_cache(maxsize=256)
def _lone_rows(num_rows: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rows` and `count` of `block_per_row`: they do not depend on the routing."""
    rows = torch.full((num_rows, block), num_rows, dtype=torch.int32)  # [R, block]
    rows[:, 0] = torch.arange(num_rows)
    return rows.view(-1).to(device), torch.tensor([num_rows * block], dtype=torch.int32, device=device)


def _empty(experts: Tensor, local_experts: int, block: int) -> AlignedRows:
    blocks = max_blocks(experts.shape[0], local_experts, block)
    rows, block_expert, count = (
        torch.empty(size, dtype=torch.int32, device=experts.device) for size in (blocks * block, blocks, 1)
    )
    return AlignedRows(rows, block_expert, count, block)


def _constants(num_experts: int, expert_map: Tensor | None) -> dict[str, int | bool]:
    """What the kernels have in common."""
    return {"E": num_experts, "HAS_MAP": expert_map is not None, "EP": _padded(num_experts)}


def _padded(num_experts: int) -> int:
    return max(triton.next_power_of_2(num_experts), 16)


def _padding_step(num_experts: int, block: int) -> int:
    """Rows of padding of every expert that are written at once."""
    return min(block, max(_TILE // _padded(num_experts), 1), 16)


def _align_at_once(
    experts: Tensor, num_experts: int, block: int, expert_map: Tensor | None, usage: Tensor | None
) -> AlignedRows:
    aligned = _empty(experts, num_experts, block)
    rows = max(triton.next_power_of_2(experts.shape[0]), 16)
    align_kernel[(1,)](
        experts, expert_map, aligned.rows, aligned.block_expert, aligned.count, usage, experts.shape[0],
        **_constants(num_experts, expert_map), HAS_USAGE=usage is not None, ROWS=rows, BM=block, BLOCKS=16,
        STEP=_padding_step(num_experts, block), num_warps=8,
    )  # fmt: skip
    return aligned


def _align_in_chunks(
    experts: Tensor,
    num_experts: int,
    block: int,
    expert_map: Tensor | None,
    usage: Tensor | None,
    chunk: int = _CHUNK,
) -> AlignedRows:
    aligned, num_rows = _empty(experts, num_experts, block), experts.shape[0]
    constants = _constants(num_experts, expert_map) | {"ROWS": chunk}
    padded_experts, chunks = int(constants["EP"]), triton.cdiv(num_rows, chunk)
    counts = torch.empty(chunks, padded_experts, dtype=torch.int32, device=experts.device)  # [chunks, EP]
    starts = torch.empty(2, padded_experts, dtype=torch.int32, device=experts.device)  # [2, EP]
    count_kernel[(chunks,)](experts, expert_map, counts, num_rows, **constants, num_warps=4)
    prefix_kernel[(1,)](
        counts, starts, aligned.rows, aligned.count, usage, chunks, num_rows,
        E=num_experts, HAS_USAGE=usage is not None, EP=padded_experts, CHUNKS=max(_TILE // padded_experts, 1),
        BM=block, STEP=_padding_step(num_experts, block), num_warps=8,
    )  # fmt: skip
    blocks = triton.next_power_of_2(triton.cdiv(aligned.max_blocks, chunks))
    scatter_kernel[(chunks,)](
        experts, expert_map, counts, starts, aligned.rows, aligned.block_expert, num_rows,
        **constants, BM=block, BLOCKS=blocks, num_warps=4,
    )  # fmt: skip
    return aligned
