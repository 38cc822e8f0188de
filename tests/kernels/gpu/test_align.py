"""Rows in the order of their experts, against sorting by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canaries import Canaries
from torch import Tensor

pytest.importorskip("triton")
from moehive.kernels.gpu import align
from moehive.kernels.gpu.align import AlignedRows, align_rows, max_blocks

pytestmark = pytest.mark.interpreted


def by_hand(experts: Tensor, num_experts: int, block: int, expert_map: Tensor | None) -> tuple[list[int], list[int]]:
    """(rows with padding, the expert of each block)."""
    ids = experts.flatten().tolist()
    local = dict(enumerate(range(num_experts) if expert_map is None else expert_map.tolist())) | {num_experts: -1}
    rows, blocks = [], []
    for expert in range(num_experts):
        mine = [row for row, chosen in enumerate(ids) if local[chosen] == expert]
        padded = mine + [len(ids)] * (-len(mine) % block)
        rows += padded
        blocks += [expert] * (len(padded) // block)
    return rows, blocks


def use_by_hand(experts: Tensor, num_experts: int, expert_map: Tensor | None) -> list[int]:
    """Rows of each local expert."""
    _, blocks = by_hand(experts, num_experts, 1, expert_map)
    return [blocks.count(expert) for expert in range(num_experts)]


def check(aligned: AlignedRows, experts: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    rows, blocks = by_hand(experts, num_experts, aligned.block, expert_map)
    count = int(aligned.count)
    assert aligned.rows[:count].tolist() == rows
    assert aligned.block_expert[: count // aligned.block].tolist() == blocks
    assert len(blocks) <= aligned.max_blocks
    assert aligned.rows.shape[0] == aligned.max_blocks * aligned.block


@st.composite
def choices(draw: st.DrawFn, most_tokens: int) -> tuple[Tensor, int, Tensor | None]:
    """(experts [T, K], E, expert_map [E] or None): some dropped, one expert with most rows, some experts elsewhere."""
    num_experts, top_k = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    tokens, seed = draw(st.integers(1, most_tokens)), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, num_experts + 1, (tokens, top_k), generator=generator)
    if draw(st.booleans()):
        experts[torch.rand(tokens, top_k, generator=generator) < 0.8] = draw(st.integers(0, num_experts))
    if not draw(st.booleans()):
        return experts, num_experts, None
    expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
    here = torch.randperm(num_experts, generator=generator)[: draw(st.integers(0, num_experts))]
    expert_map[here] = torch.arange(len(here), dtype=torch.int32)  # local order is not the global one
    return experts, num_experts, expert_map


def run(kind: str, choice: tuple[Tensor, int, Tensor | None], block: int, dtype: torch.dtype) -> AlignedRows:
    experts, num_experts, expert_map = choice
    with Canaries() as guard, guard.allocations():
        flat = guard(experts.to(dtype)).view(-1)
        mapping = None if expert_map is None else guard(expert_map)
        usage = guard(torch.full((num_experts,), 5))
        if kind == "at once":
            aligned = align._align_at_once(flat, num_experts, block, mapping, usage)
        else:
            aligned = align._align_in_chunks(flat, num_experts, block, mapping, usage, chunk=16)
    assert (usage - 5).tolist() == use_by_hand(*choice)
    return aligned


@settings(max_examples=15)
@given(choices(most_tokens=12), st.sampled_from([1, 16, 64]), st.sampled_from([torch.int32, torch.int64]))
def test_one_program(choice: tuple[Tensor, int, Tensor | None], block: int, dtype: torch.dtype) -> None:
    check(run("at once", choice, block, dtype), *choice)


@settings(max_examples=15)
@given(choices(most_tokens=30), st.sampled_from([1, 16, 32]), st.sampled_from([torch.int32, torch.int64]))
def test_chunks(choice: tuple[Tensor, int, Tensor | None], block: int, dtype: torch.dtype) -> None:
    check(run("in chunks", choice, block, dtype), *choice)


def test_counts_of_more_chunks_than_one_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "_TILE", 16)  # two chunks of eight experts at a time
    experts = torch.randint(0, 6, (60, 2), generator=torch.Generator().manual_seed(0))
    check(run("in chunks", (experts, 6, None), 16, torch.int64), experts, 6, None)


@pytest.mark.parametrize("mapped", [False, True])
def test_few_rows_get_a_block_each(mapped: bool) -> None:
    experts = torch.tensor([[3, 40], [39, 3]])
    expert_map = torch.arange(40, dtype=torch.int32) - 1 if mapped else None
    with Canaries() as guard, guard.allocations():
        usage = guard(torch.zeros(40, dtype=torch.int64))
        aligned = align_rows(guard(experts), 40, 16, expert_map, usage)
    assert usage.tolist() == use_by_hand(experts, 40, expert_map)
    assert aligned.block_expert.tolist() == ([2, -1, 38, 2] if mapped else [3, -1, 39, 3])
    assert int(aligned.count) == 4 * 16
    rows = aligned.rows.view(4, 16)
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    assert (rows[:, 1:] == 4).all()


def test_the_way_follows_from_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("block_per_row", "_align_at_once", "_align_in_chunks"):
        monkeypatch.setattr(align, name, lambda *_, name=name: taken.append(name))
    for tokens in (16, 17, 256, 257):
        align_rows(torch.zeros(tokens, 2, dtype=torch.int64), 128, 16)
    assert taken == ["block_per_row", "_align_at_once", "_align_at_once", "_align_in_chunks"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.sampled_from([1, 4, 16]))
def test_the_bound_on_blocks_is_kept_and_met(sizes: list[int], block: int) -> None:
    num_rows, num_experts = sum(sizes), len(sizes)
    assert sum(-(-size // block) for size in sizes) <= max_blocks(num_rows, num_experts, block)
    lone = min(num_rows, num_experts)
    worst = [1] * (lone - 1) + [num_rows - lone + 1] if lone else []
    assert sum(-(-size // block) for size in worst) >= max_blocks(num_rows, num_experts, block) - (lone > 1)


def test_blocks_are_powers_of_two() -> None:
    with pytest.raises(ValueError, match="blocks of 24 rows"):
        align_rows(torch.zeros(2, 2, dtype=torch.int64), 4, 24)
