"""The choice of configuration: within the limits of any GPU, and what the published tables say where they say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import (
    Device,
    Matrix,
    Tile,
    active_experts,
    block_rows,
    check,
    choose,
    fits_groups,
    shared_memory,
)

H100 = Device(90, 132)
PLAIN = WeightFormat.PLAIN


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, Matrix, Matrix, Device]:
    weight_format = draw(st.sampled_from(list(WeightFormat)))
    group = {
        WeightFormat.PLAIN: 0,
        WeightFormat.MXFP4: 32,
        WeightFormat.FP8_BLOCK: draw(st.sampled_from([32, 64, 96, 128, 256])),
        WeightFormat.INT4_GROUP: 32 * draw(st.integers(1, 40)),
        WeightFormat.INT8_CHANNEL: 0,
    }[weight_format]
    hidden, inner = draw(st.integers(1, 16384)), draw(st.integers(1, 16384))
    element = draw(st.sampled_from([2, 2, 4]))
    gate_up = Matrix(inner, hidden, weight_format, group, gated=True, element=element)
    down = Matrix(hidden, inner, weight_format, group, gated=False, element=element)
    device = Device(draw(st.sampled_from([75, 80, 86, 89, 90, 100, 120])), draw(st.integers(1, 160)))
    return draw(st.integers(0, 200_000)), draw(st.integers(1, 512)), gate_up, down, device


@given(problems())
def test_every_choice_can_run(problem: tuple[int, int, Matrix, Matrix, Device]) -> None:
    rows, experts, gate_up, down, device = problem
    chosen = choose(rows, experts, gate_up, down, device)
    check(chosen, gate_up, down, device)
    assert chosen.block in (16, 32, 64, 128)
    for tile, matrix in ((chosen.gate_up, gate_up), (chosen.down, down)):
        sizes = (tile.columns, tile.inner, tile.warps, tile.split)
        assert all(size & (size - 1) == 0 and size > 0 for size in sizes)
        assert tile.columns >= 16
        assert tile.inner >= 32
        assert shared_memory(tile, chosen.block, matrix, device) <= device.shared_memory
        # fp32 sums that one thread holds: more than 128 leave no registers for anything else
        assert chosen.block * tile.columns * (2 if matrix.gated else 1) <= 128 * 32 * tile.warps
        assert tile.split == 1 or matrix.inner // tile.inner >= 4 * tile.split
        if any(matrix.inner % size == 0 and fits_groups(size, matrix) for size in (32, 64, 128)):
            assert matrix.inner % tile.inner == 0  # else every load is checked against the end


@given(st.integers(0, 100_000), st.integers(1, 512))
def test_active_experts_are_a_number_of_experts(rows: int, experts: int) -> None:
    assert 0 <= active_experts(rows, experts) <= min(rows, experts) + 1e-6
    assert active_experts(rows, experts) <= active_experts(rows + 1, experts)


@pytest.mark.parametrize(
    ("rows", "block"), [(0.1, 16), (1, 16), (8, 16), (9, 32), (16, 32), (32, 64), (33, 128), (64, 128), (5000, 128)]
)
def test_blocks_have_twice_the_rows_of_an_expert(rows: float, block: int) -> None:
    assert block_rows(rows) == block


def choice(rows: int, experts: int, hidden: int, inner: int, weight_format: WeightFormat = PLAIN, group: int = 0,
           device: Device = H100) -> tuple[int, Tile, Tile]:  # fmt: skip
    chosen = choose(
        rows, experts, Matrix(inner, hidden, weight_format, group, gated=True),
        Matrix(hidden, inner, weight_format, group), device,
    )  # fmt: skip
    return chosen.block, chosen.gate_up, chosen.down


def test_decoding_is_cut_as_the_published_tables_say() -> None:
    """vLLM's files for H100 and H200: 16 rows, 64 or 128 rows of weights, 128 inner, 4 warps, 4 stages."""
    block, gate_up, down = choice(8, 128, 2048, 768)
    assert (block, 2 * gate_up.columns, gate_up.inner, gate_up.warps, gate_up.stages) == (16, 64, 128, 4, 4)
    assert (down.columns, down.split) == (64, 1)


def test_prefill_is_cut_as_the_published_tables_say() -> None:
    block, gate_up, down = choice(8192 * 8, 128, 2048, 768)
    assert (block, 2 * gate_up.columns, gate_up.inner, gate_up.warps) == (128, 256, 64, 8)
    assert (block, down.columns, down.inner, down.warps, down.stages) == (128, 256, 64, 8, 4)
    assert gate_up.persistent
    assert down.persistent


def test_hidden_2880_takes_tiles_of_64() -> None:
    for weight_format, group in ((PLAIN, 0), (WeightFormat.MXFP4, 32)):
        for rows in (4, 400, 40_000):
            _, gate_up, down = choice(rows, 128, 2880, 2880, weight_format, group)
            assert gate_up.inner == down.inner == 64


def test_one_expert_with_few_columns_is_split() -> None:
    """A node that holds one expert and serves one row: 12 tiles for 132 multiprocessors."""
    _, gate_up, down = choice(1, 1, 2048, 768)
    assert gate_up.split > 1
    assert down.split == 1  # 768 inner columns are 6 tiles
    _, gate_up, down = choice(1, 1, 7168, 18432)
    assert gate_up.split == 1


def test_weights_are_the_left_side_only_where_that_gives_warpgroup_instructions() -> None:
    assert choice(160, 16, 4096, 4096)[1].swap
    assert not choice(160, 16, 4096, 4096, device=Device(80, 108))[1].swap
    assert not choice(160, 16, 4096, 4096, WeightFormat.INT4_GROUP, 32)[1].swap
    assert not choice(16, 16, 4096, 4096)[1].swap


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile(64, 256), "do not fit groups of 128"),
        (Tile(256, 128, stages=8), "bytes of shared memory"),
        (Tile(64, 64, split=2, persistent=True), "does not split"),
    ],
)
def test_what_cannot_run_is_refused(tile: Tile, message: str) -> None:
    matrix = Matrix(1024, 1024, WeightFormat.FP8_BLOCK, 128)
    chosen = choose(8, 8, matrix, matrix, H100)
    with pytest.raises(ValueError, match=message):
        check(type(chosen)(128, tile, chosen.down), matrix, matrix, H100)
