"""Layers of experts on the processor: against transformers' eager bit for bit, and against float64 in every format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.random_experts import CLAMPED, KINDS, Kind, layer_oracle, random_expert, relative_error
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moehive.kernels.combine import add_sorted_rows
from moehive.kernels.cpu import experts as module
from moehive.kernels.cpu.experts import expert_outputs, expert_rows_fast, run_experts
from moehive.kernels.cpu.packed import can_pack, pack_expert
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import sort_rows

EXACT = 1e-5
BF16, F32 = torch.bfloat16, torch.float32
GPT_OSS = FfnSpec(gate="clamped-interleaved", transposed=True, alpha=1.702, limit=7.0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def eager_module(spec: FfnSpec, sizes: tuple[int, int, int], dtype: torch.dtype) -> Any:
    names = dict(zip(("hidden_size", "intermediate_size", "num_local_experts"), sizes, strict=True))
    if spec.transposed:
        experts: Any = GptOssExperts(GptOssConfig(**names, experts_implementation="eager"))
    else:
        experts = MixtralExperts(MixtralConfig(**names, hidden_act=spec.activation, experts_implementation="eager"))
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4  # wide enough to reach the clamp
    return experts.to(dtype).requires_grad_(False)


def weights_of(experts: Any) -> list[ExpertWeights]:
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    parts = [getattr(experts, name, None) for name in names]
    return [ExpertWeights(*(None if p is None else p[e] for p in parts)) for e in range(experts.num_experts)]


def routing(tokens: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    scores, index = torch.rand(tokens, experts, generator=generator).topk(top_k)
    return torch.randn(tokens, hidden, generator=generator).to(dtype), index, scores


def exact_layer(
    hidden: Tensor, index: Tensor, weights: Tensor, experts: list[ExpertWeights], spec: FfnSpec, run: int
) -> Tensor:
    """With `run` experts in memory at a time."""
    rows, out = sort_rows(index, len(experts)), torch.zeros_like(hidden)
    used = [experts[number] for number in rows.experts]
    runs = (used[start : start + run] for start in range(0, len(used), run))
    for part, outputs in expert_outputs(hidden, rows, runs, spec):
        add_sorted_rows(out, part, outputs, weights)
    return out


SIZES = [
    pytest.param((64, 192, 8), id="even"),
    pytest.param((33, 21, 8), id="lines"),  # rows begin anywhere in a cache line: fp32 products round differently
    pytest.param((64, 48, 8), id="vectors"),  # rows do not end with a vector, where fp32 sigmoid rounds differently
]


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (2, 1), (30, 1), (150, 1), (150, 2)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", [FfnSpec(), FfnSpec(activation="gelu"), GPT_OSS], ids=["silu", "gelu", "clamped"])
def test_experts_together_equal_eager_bit_for_bit(
    spec: FfnSpec, sizes: tuple[int, int, int], dtype: torch.dtype, tokens: int, count: int
) -> None:
    experts = eager_module(spec, sizes, dtype)
    hidden, index, weights = routing(tokens, sizes[0], sizes[2], 5, dtype)
    with threads(count):
        wanted = experts(hidden, index, weights)
        for run in (1, 3, 8) if count == 1 else (8,):
            assert torch.equal(exact_layer(hidden, index, weights, weights_of(experts), spec, run), wanted)


def test_experts_are_computed_alone_where_threads_would_share_a_row() -> None:
    rows = torch.empty(100, 64)
    assert module._same_bits(rows, 512, FfnSpec())
    with threads(2):
        assert module._same_bits(rows[:64], 511 // 64 * 64, FfnSpec())
        assert not module._same_bits(rows, 512, FfnSpec())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parts_of_a_run_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = eager_module(FfnSpec(), (64, 192, 8), dtype)
    hidden, index, weights = routing(60, 64, 8, 3, dtype)
    monkeypatch.setattr(module, "_AT_ONCE", 30 * 384)  # an expert has 22 rows in the middle
    assert torch.equal(
        exact_layer(hidden, index, weights, weights_of(experts), FfnSpec(), 8), experts(hidden, index, weights)
    )


def test_gradients_go_through_as_through_eager() -> None:
    experts = eager_module(FfnSpec(), (64, 192, 8), F32)
    hidden, index, weights = routing(7, 64, 8, 3, F32)
    gradients = []
    for layer in (experts, lambda *inputs: exact_layer(*inputs, weights_of(experts), FfnSpec(), 8)):
        inputs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        layer(inputs[0], index, inputs[1]).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


# --- every form against float64 ---------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> tuple[Kind, FfnSpec, int, int, int, int, int, int]:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    hidden, inner = (32 * draw(st.integers(1, 5)) for _ in range(2))
    experts = draw(st.integers(1, 6))
    spec = draw(st.sampled_from([FfnSpec(), FfnSpec(activation="relu2"), CLAMPED]))
    top_k, tokens, seed = draw(st.integers(1, experts)), draw(st.integers(0, 70)), draw(st.integers(0, 2**31))
    return kind, spec, hidden, inner, experts, top_k, tokens, seed


@given(layers(), st.booleans(), st.booleans())
def test_every_format_equals_float64(
    layer: tuple[Kind, FfnSpec, int, int, int, int, int, int], bias: bool, absent: bool
) -> None:
    """Empty experts, one that takes all, choices that are left out, experts that are not here."""
    kind, spec, hidden_size, inner, count, top_k, tokens, seed = layer
    generator = torch.Generator().manual_seed(seed)
    experts = [random_expert(kind, hidden_size, inner, generator, bias=bias) for _ in range(count)]
    here = [None if absent and number % 2 else expert for number, expert in enumerate(experts)]
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    index = torch.rand(tokens, count + 1, generator=generator).topk(top_k).indices
    if seed % 3 == 0:
        index[:, :1] = 0
        index[:, 1:] = count
    weights = torch.rand(tokens, top_k, generator=generator)
    matrices = [None if expert is None else expert.matrices for expert in here]
    found = run_experts(hidden, index, weights, matrices, spec)
    assert found.dtype == F32
    assert relative_error(found, layer_oracle(hidden, index, weights, here, spec)) <= EXACT


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 70])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "float32" not in kind])
def test_bf16_is_as_near_to_float64_as_bf16_can_be(kind: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = [random_expert(KINDS[kind], 256, 128, generator, bias=True) for _ in range(4)]
    hidden, index, weights = routing(tokens, 256, 4, 2, BF16)
    matrices = [expert.matrices for expert in experts]
    wanted = layer_oracle(hidden, index, weights, experts, FfnSpec())
    found = run_experts(hidden, index, weights, matrices, FfnSpec(), dtype=F32)
    assert found.dtype == F32
    assert relative_error(found, wanted) <= 2**-6
    if can_pack():
        packed = [pack_expert(expert) for expert in matrices]
        assert relative_error(run_experts(hidden, index, weights, packed, FfnSpec(), dtype=F32), wanted) <= 2**-6


def test_the_hidden_size_of_gpt_oss() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(KINDS["mxfp4"], 2880, 96, generator, bias=True) for _ in range(3)]
    hidden, index, weights = routing(4, 2880, 3, 2, F32)
    found = run_experts(hidden, index, weights, [expert.matrices for expert in experts], CLAMPED)
    assert relative_error(found, layer_oracle(hidden, index, weights, experts, CLAMPED)) <= EXACT


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("spec", [FfnSpec(), GPT_OSS], ids=["silu", "clamped"])
def test_the_fast_way_agrees_with_the_exact_one(spec: FfnSpec, tokens: int) -> None:
    for dtype, tolerance in ((F32, EXACT), (BF16, 2**-6)):
        weights = weights_of(eager_module(spec, (96, 64, 1), dtype))[0]
        rows = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
        found = expert_rows_fast(rows, weights, spec)
        assert found.dtype == dtype
        assert relative_error(found, expert_ffn(rows, weights, spec).double()) <= tolerance


def test_partial_sums_of_two_holders_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [random_expert(KINDS["plain-float32"], 64, 32, generator).matrices for _ in range(6)]
    hidden, index, weights = routing(9, 64, 6, 3, F32)
    whole = run_experts(hidden, index, weights, experts, FfnSpec())
    halves = [
        run_experts(hidden, index, weights, [e if n % 2 == odd else None for n, e in enumerate(experts)], FfnSpec())
        for odd in (0, 1)
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)


def test_an_index_outside_the_layer_is_an_error() -> None:
    experts = [random_expert(KINDS["plain-float32"], 32, 32, torch.Generator()).matrices]
    with pytest.raises(ValueError, match="expert index 2 of a model with 1"):
        run_experts(torch.ones(1, 32), torch.tensor([[2]]), torch.ones(1, 1), experts, FfnSpec())


def test_experts_that_are_missing_from_the_runs_are_a_bug_of_the_caller() -> None:
    experts = [random_expert(KINDS["plain-float32"], 32, 32, torch.Generator()).matrices]
    rows = sort_rows(torch.tensor([[0, 1]]), 2)
    with pytest.raises(AssertionError, match="1 experts were given for the rows of 2"):
        list(expert_outputs(torch.ones(1, 32), rows, [experts], FfnSpec()))
