"""Whole layers against a float64 oracle under the interpreter, in every weight format and every way of cutting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.canaries import Canaries
from support.random_experts import CLAMPED, KINDS, Expert, Kind, layer_oracle, random_expert, relative_error
from torch import Tensor

pytest.importorskip("triton")
from moehive.kernels.expert_ffn import ACTIVATIONS, FfnSpec
from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu import experts as experts_module
from moehive.kernels.gpu.configuration import Configuration, Device, Tile
from moehive.kernels.gpu.experts import run_experts
from moehive.kernels.gpu.table import ExpertTable

pytestmark = pytest.mark.interpreted

EXACT = 1e-5  # relative error in fp32
SMALL = Configuration(16, Tile(64, 64), Tile(64, 64))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def routing(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, and weights."""
    scores, index = torch.rand(tokens, experts, generator=generator).topk(top_k)
    return index, scores


def check_layer(
    experts: list[Expert | None],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    spec: FfnSpec,
    configuration: Configuration | None = SMALL,
) -> None:
    matrices = [None if expert is None else expert.matrices for expert in experts]
    found = run_experts(hidden, index, weights, matrices, spec, dtype=torch.float32, configuration=configuration)
    assert relative_error(found, layer_oracle(hidden, index, weights, experts, spec)) <= EXACT


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_format_equals_the_oracle(kind: Kind) -> None:
    """Rows that are no multiple of a block, columns of 48 + 32: ragged tiles, and blocks of 128 that are cut."""
    generator, spec = seeded(1), CLAMPED if kind.format is WeightFormat.MXFP4 else FfnSpec()
    with Canaries() as guard:
        experts: list[Expert | None] = [
            random_expert(kind, 160, 96, generator, bias=spec is CLAMPED, place=guard) for _ in range(4)
        ]
        hidden = guard(torch.randn(5, 160, generator=generator))
        index, weights = routing(5, 4, 2, generator)
        check_layer(experts, hidden, guard(index), guard(weights), spec)


CUTS = {
    "split": Configuration(16, Tile(64, 64, split=2), Tile(64, 32, split=2)),
    "split more than there are tiles": Configuration(16, Tile(128, 64, split=4), Tile(128, 64, split=4)),
    "swap": Configuration(16, Tile(64, 64, swap=True, split=2), Tile(64, 64, swap=True)),
    "persistent": Configuration(16, Tile(32, 64, group=2, persistent=True), Tile(64, 64, group=4, persistent=True)),
    "tall and wide": Configuration(32, Tile(128, 64, group=2), Tile(256, 64, group=3)),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", ["plain-bfloat16-transposed", "int4-group-g32-zero"])
def test_every_way_of_cutting_equals_the_oracle(name: str, cut: Configuration, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of two multiprocessors, so that a persistent program has several tiles."""
    monkeypatch.setattr(experts_module, "device_facts", lambda device: Device(90, 2))
    generator = seeded(2)
    spec = CLAMPED if name == "plain-bfloat16-transposed" else FfnSpec()
    experts: list[Expert | None] = [
        random_expert(KINDS[name], 128, 96, generator, bias=spec is CLAMPED) for _ in range(3)
    ]
    hidden = torch.randn(7, 128, generator=generator)
    check_layer(experts, hidden, *routing(7, 3, 2, generator), spec, cut)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("split", [1, 2])
def test_activations(activation: str, split: int) -> None:
    generator = seeded(3)
    experts: list[Expert | None] = [random_expert(KINDS["plain-float32"], 64, 32, generator) for _ in range(2)]
    cut = Configuration(16, Tile(32, 32, split=split), Tile(32, 32))
    hidden = torch.randn(3, 64, generator=generator)
    check_layer(experts, hidden, *routing(3, 2, 1, generator), FfnSpec(activation=activation), cut)


def test_clamped_gate_where_it_clamps() -> None:
    generator = seeded(4)
    experts: list[Expert | None] = [
        random_expert(KINDS["plain-bfloat16-transposed"], 64, 32, generator, bias=True) for _ in range(2)
    ]
    check_layer(experts, 12 * torch.randn(6, 64, generator=generator), *routing(6, 2, 2, generator), CLAMPED)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Kind, FfnSpec, int, int, int, int, int, Configuration, int]:
    kind = draw(st.sampled_from(list(KINDS.values())))
    packed = kind.format in (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
    step = 32 if kind.format is WeightFormat.MXFP4 else 8 if packed else 1
    hidden, inner = (step * draw(st.integers(1, 144 // step)) for _ in range(2))
    experts = draw(st.integers(1, 5))
    top_k = draw(st.integers(1, experts))
    fine = st.builds(
        Tile, columns=st.sampled_from([16, 32]), inner=st.sampled_from([32, 64]), group=st.integers(1, 3),
        split=st.sampled_from([1, 1, 2]), swap=st.booleans(),
    )  # fmt: skip
    cut = Configuration(draw(st.sampled_from([16, 32])), draw(fine), draw(fine))
    spec = draw(st.sampled_from([FfnSpec(), CLAMPED]))
    return kind, spec, hidden, inner, experts, top_k, draw(st.integers(0, 6)), cut, draw(st.integers(0, 2**31))


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(layers())
def test_any_layer_equals_the_oracle(
    layer: tuple[Kind, FfnSpec, int, int, int, int, int, Configuration, int],
) -> None:
    """Any shape, K no multiple of the tile, any experts missing, choices left out, between margins of NaN."""
    kind, spec, hidden_size, inner, count, top_k, tokens, cut, seed = layer
    generator = seeded(seed)
    with Canaries() as guard:
        experts = [
            random_expert(kind, hidden_size, inner, generator, bias=spec is CLAMPED, place=guard)
            if torch.rand((), generator=generator) < 0.8
            else None
            for _ in range(count)
        ]
        hidden = guard(torch.randn(tokens, hidden_size, generator=generator))
        index, weights = routing(tokens, count, top_k, generator)
        index[torch.rand(index.shape, generator=generator) < 0.1] = count
        check_layer(experts, hidden, guard(index), guard(weights), spec, cut)


def test_hidden_2880() -> None:
    """GPT-OSS's width, of which 64 is the largest power of two, in as few tiles as may be."""
    generator, cut = seeded(5), Configuration(16, Tile(32, 64), Tile(1024, 32))
    experts: list[Expert | None] = [random_expert(KINDS["mxfp4"], 2880, 32, generator, bias=True)]
    hidden = torch.randn(2, 2880, generator=generator)
    check_layer(experts, hidden, *routing(2, 1, 1, generator), CLAMPED, cut)


def test_groups_that_are_no_power_of_two() -> None:
    generator, kind = seeded(12), Kind(WeightFormat.INT4_GROUP, group=96, dtype=torch.float16, zero=True)
    experts: list[Expert | None] = [random_expert(kind, 200, 96, generator) for _ in range(2)]
    hidden = torch.randn(2, 200, generator=generator)
    index, weights = routing(2, 2, 1, generator)
    check_layer(experts, hidden, index, weights, FfnSpec(), Configuration(16, Tile(128, 32), Tile(256, 32)))
    with pytest.raises(ValueError, match="do not fit groups of 96"):
        check_layer(experts, hidden, index, weights, FfnSpec())


def test_one_expert_takes_all_rows() -> None:
    """More than two blocks."""
    generator = seeded(6)
    experts: list[Expert | None] = [random_expert(KINDS["plain-bfloat16"], 64, 32, generator) for _ in range(4)]
    hidden = torch.randn(40, 64, generator=generator)
    index = torch.full((40, 1), 2)
    check_layer(experts, hidden, index, torch.rand(40, 1, generator=generator), FfnSpec())


def test_a_slice_of_an_expert_is_its_part_of_the_sum() -> None:
    """Tensor parallelism: rows of gate and up, columns of down, as strided views and as transposed copies."""
    generator, spec = seeded(7), FfnSpec()
    whole = random_expert(KINDS["plain-bfloat16"], 64, 96, generator)
    hidden = torch.randn(3, 64, generator=generator)
    index, weights = torch.zeros(3, 1, dtype=torch.int64), torch.rand(3, 1, generator=generator)
    total = torch.zeros(3, 64)
    gate, up = whole.matrices.gate_up.data.chunk(2)
    for part, column_major in ((slice(0, 32), False), (slice(32, 96), True)):
        both = replace(whole.matrices.gate_up, data=torch.cat((gate[part], up[part])))
        columns = whole.matrices.down.data[:, part]
        down = replace(whole.matrices.down, data=columns.t().contiguous().t() if column_major else columns)
        share = replace(whole.matrices, gate_up=both, down=down)
        total += run_experts(hidden, index, weights, [share], spec, configuration=SMALL)
    assert relative_error(total, layer_oracle(hidden, index, weights, [whole], spec)) <= EXACT


def test_an_expert_can_be_loaded_and_evicted_alone() -> None:
    generator, spec = seeded(8), FfnSpec()
    experts = [random_expert(KINDS["int4-group-g64"], 64, 64, generator) for _ in range(3)]
    hidden = torch.randn(6, 64, generator=generator)
    index, weights = routing(6, 3, 2, generator)
    table = ExpertTable(3, torch.device("cpu"))
    here: list[Expert | None] = [None, None, None]
    assert not run_experts(hidden, index, weights, table, spec).any()
    for number, present in ((1, True), (0, True), (1, False)):
        here[number] = experts[number] if present else None
        table.put(number, experts[number].matrices) if present else table.remove(number)
        found = run_experts(hidden, index, weights, table, spec, configuration=SMALL)
        assert relative_error(found, layer_oracle(hidden, index, weights, here, spec)) <= EXACT
    table.put(1, experts[1].matrices)
    table.put(2, experts[2].matrices)
    assert table.expert_map is None


def test_the_order_in_which_experts_are_named_does_not_change_a_bit() -> None:
    generator = seeded(9)
    experts = [random_expert(KINDS["fp8-block"], 128, 64, generator).matrices for _ in range(4)]
    hidden = torch.randn(3, 128, generator=generator)
    index, weights = routing(3, 4, 3, generator)
    order = torch.argsort(torch.rand(index.shape, generator=generator), dim=1)
    cut = Configuration(16, Tile(64, 64, split=2), Tile(128, 32, split=2))
    first = run_experts(hidden, index, weights, experts, FfnSpec(), configuration=cut)
    again = run_experts(hidden, index.gather(1, order), weights.gather(1, order), experts, FfnSpec(), configuration=cut)
    assert torch.equal(first, again)


def test_hidden_in_bf16_loses_only_its_own_precision() -> None:
    generator = seeded(10)
    experts: list[Expert | None] = [random_expert(KINDS["plain-bfloat16"], 64, 32, generator) for _ in range(2)]
    hidden = torch.randn(4, 64, generator=generator).bfloat16()
    check_layer(experts, hidden, *routing(4, 2, 2, generator), FfnSpec())


@pytest.mark.parametrize("cut", [SMALL, CUTS["split"]], ids=["whole", "split"])
def test_memory_that_nobody_wrote_is_not_read(cut: Configuration) -> None:
    """Rows of experts that are elsewhere and of choices that were left out stay as torch.empty gave them: NaN here."""
    generator = seeded(13)
    experts = [random_expert(KINDS["plain-float32"], 64, 32, generator), None]
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.rand(3, 2, generator=generator)
    hidden = torch.randn(3, 64, generator=generator)
    torch.use_deterministic_algorithms(True)  # also fills memory
    try:
        assert torch.empty(3).isnan().all()
        check_layer(experts, hidden, index, weights, FfnSpec(), cut)
    finally:
        torch.use_deterministic_algorithms(False)


def test_usage_counts_the_rows_of_experts_that_are_here() -> None:
    expert = random_expert(KINDS["plain-float32"], 64, 32, seeded(0)).matrices
    usage = torch.tensor([5, 5, 5])
    index = torch.tensor([[0, 1], [2, 0], [3, 0]])  # 1 is elsewhere, 3 was left out
    run_experts(torch.ones(3, 64), index, torch.ones(3, 2), [expert, None, expert], FfnSpec(), usage=usage)
    assert usage.tolist() == [8, 5, 6]


def test_no_tokens() -> None:
    expert = random_expert(KINDS["plain-float32"], 64, 32, seeded(0)).matrices
    index = torch.empty(0, 2, dtype=torch.int64)
    out = run_experts(torch.empty(0, 64), index, torch.empty(0, 2), [expert], FfnSpec())
    assert out.shape == (0, 64)


def test_tensors_that_do_not_fit_are_refused() -> None:
    generator = seeded(11)
    expert = random_expert(KINDS["plain-float32"], 64, 32, generator).matrices
    hidden, index, weights = torch.randn(2, 64), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    for message, arguments in {
        r"are not \[T, H\] and \[T, k\]": (hidden, index[:1], weights[:1], [expert]),
        "weights": (hidden, index, weights[:, :0], [expert]),
        "hidden is torch.float64": (hidden.double(), index, weights, [expert]),
        "hidden has 32 columns, the experts 64": (hidden[:, :32], index, weights, [expert]),
    }.items():
        with pytest.raises(ValueError, match=message):
            run_experts(*arguments, FfnSpec())
