"""The parts of the benchmark: shapes, roofline, experts, calls, memory."""

from __future__ import annotations

import pytest
import torch

from moehive.kernels.benchmark.layers import make_calls, make_experts
from moehive.kernels.benchmark.machine import Ceilings, measure_ceilings
from moehive.kernels.benchmark.measure import measure_layer, peak_bytes
from moehive.kernels.benchmark.shapes import CLAMPED, FORMATS, SHAPES, LayerShape
from moehive.kernels.dequantize import dequantize

CPU = torch.device("cpu")
H200 = Ceilings(4.3e12, 790e12)
TINY = LayerShape("tiny", 8, 2, 64, 32)

# The project's kernel reference, section 6: microseconds on an H200
IDEAL = {"mixtral-8x7b": (164, 7307), "qwen3-30b-a3b": (17.6, 783), "gpt-oss-120b": (12.3, 2064)}


@pytest.mark.parametrize("name", IDEAL)
def test_ideal_times_are_those_of_the_reference(name: str) -> None:
    shape = SHAPES[name]
    for tokens, active, microseconds in (
        (1, shape.top_k, IDEAL[name][0]),
        (8192, shape.experts, IDEAL[name][1]),
    ):
        found = H200.seconds(shape.bytes_moved(tokens, active), shape.flops(tokens * shape.top_k))
        assert found * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_a_dense_layer_with_as_many_parameters() -> None:
    weights, gate_up_and_inner, ends = 3 * 64 * 8 * 32, 5 * 3 * 8 * 32, 5 * 2 * 64
    assert TINY.dense_bytes(5) == 2 * (weights + gate_up_and_inner + ends)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [64, 96])
def test_experts_of_every_format_have_their_size_and_finite_values(name: str, columns: int) -> None:
    shape = LayerShape("t", 4, 1, 256, columns, FORMATS[name], CLAMPED)
    experts = make_experts(shape, CPU, budget=1e9)
    first = experts.every[0]
    assert experts.held == len(experts.every) == 4
    for matrix in (first.gate_up, first.down):
        values = dequantize(matrix, torch.float32)
        assert values.isfinite().all()
        assert 0.3 < float(values.std()) * matrix.shape[1] ** 0.5 < 3
    assert first.gate_up.nbytes + first.down.nbytes == pytest.approx(shape.expert_bytes, rel=0.05)


def test_experts_that_do_not_fit_share_the_memory_of_others() -> None:
    experts = make_experts(TINY, CPU, budget=3.5 * TINY.expert_bytes)
    assert (len(experts.every), experts.held) == (8, 3)
    assert experts.every[0] is experts.every[3] is not experts.every[1]
    assert experts.nbytes == 3 * TINY.expert_bytes
    assert make_experts(TINY, CPU, budget=0).held == TINY.top_k


def test_calls_differ() -> None:
    calls = make_calls(TINY, 50, 2, CPU)
    assert not torch.equal(calls[0].index, calls[1].index)
    assert all(call.active == 8 and call.hidden.shape == (50, 64) for call in calls)
    assert all(call.index.sort(1).values.diff(dim=1).min() > 0 for call in calls)  # a token's experts are distinct
    torch.testing.assert_close(calls[0].weights.sum(1), torch.ones(50))


def test_peak_memory_is_the_most_that_is_held_at_a_time() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1 << 20, dtype=torch.uint8)
        second = torch.ones(1 << 22, dtype=torch.uint8)
        del second
        return torch.cat([first, torch.ones(1 << 20, dtype=torch.uint8)])

    assert peak_bytes(call, CPU) == pytest.approx(5 << 20, rel=0.01)


def test_a_layer_is_measured_against_the_roofline() -> None:
    ceilings = measure_ceilings(CPU, quick=True)
    assert ceilings.bandwidth > 0
    assert ceilings.rate > 0
    experts = make_experts(TINY, CPU, budget=1e9)
    found = measure_layer(TINY, "bf16", experts, 1, ceilings, CPU, budget=0.0)
    assert found.rate == pytest.approx(TINY.flops(2) / found.seconds)
    assert found.of_roofline == pytest.approx(
        max(found.bandwidth / ceilings.bandwidth, found.rate / ceilings.rate), rel=1e-6
    )
    assert (found.utilisation, found.gini, found.active) == (0.25, 0.75, 2.0)  # two of eight in every call
    assert found.peak_bytes > found.weight_bytes == 8 * TINY.expert_bytes
