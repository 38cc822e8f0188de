"""The routing kernels under the interpreter: against transformers' routers, and against ours in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canaries import Canaries, before_a_wall
from support.routers import (
    ROUTER_FAMILIES,
    VARIANTS,
    FamilyRouter,
    TiedLogits,
    assert_same_routing,
    by_expert,
    family_router,
    tied_logits,
)
from torch import Tensor

pytest.importorskip("triton")
from support.aot_route import ROUTERS

from moehive.kernels.gpu.route import launch_capacity, launch_route, route_on_gpu
from moehive.kernels.router import GroupScore, RouterSpec, Routing, Score, route

pytestmark = [
    pytest.mark.interpreted,
    # a GPU divides by zero and computes with NaN without a word, numpy does not
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def routed(
    logits: Tensor, spec: RouterSpec, correction_bias: Tensor | None = None, sequence_length: int | None = None
) -> Routing:
    """`route_on_gpu` with every buffer watched."""
    with Canaries() as guard, guard.allocations():
        bias = None if correction_bias is None else guard(correction_bias)
        return route_on_gpu(guard(logits), spec, bias, sequence_length=sequence_length)


def assert_equal_to_torch(logits: Tensor, spec: RouterSpec, bias: Tensor | None, length: int | None = None) -> None:
    """The same experts in the same order, and weights but for the last bit of what was exponentiated."""
    found, wanted = routed(logits, spec, bias, length), route(logits, spec, bias, sequence_length=length)
    assert torch.equal(found.experts.long(), wanted.experts)
    assert found.weights.dtype == wanted.weights.dtype
    rounding = torch.finfo(wanted.weights.dtype).eps if wanted.weights.dtype != torch.float32 else 0.0
    torch.testing.assert_close(found.weights, wanted.weights, rtol=2e-6 + rounding, atol=1e-7)


@pytest.mark.parametrize("family", [*ROUTER_FAMILIES, *VARIANTS])
def test_routing_equals_transformers_ties_and_roundings_included(family: str) -> None:
    exact, narrow = family_router(family), family_router(family, torch.bfloat16)

    @settings(max_examples=3)
    @given(tied_logits())
    def check(drawn: TiedLogits) -> None:
        for router in (exact, narrow):
            assert_equal_to_transformers(router, drawn.apply(router))

    check()


def assert_equal_to_transformers(router: FamilyRouter, logits: Tensor) -> None:
    """The same sets, and weights within 1e-6, or where they are bf16 within its rounding."""
    found, wanted = (
        route_on_gpu(logits, router.spec, router.correction_bias, router.weight.dtype),
        router.settled(logits),
    )
    assert found.weights.dtype == wanted.weights.dtype
    if found.weights.dtype == torch.float32:
        assert_same_routing(found, wanted, router.spec.num_experts)
    else:
        ours, theirs = (by_expert(routing, router.spec.num_experts) for routing in (found, wanted))
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_full_size(name: str, dtype: torch.dtype) -> None:
    spec = ROUTERS[name]
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(1, spec.num_experts, generator=generator)
    coarse = (torch.randn(1, spec.num_experts, generator=generator) * 2).round() / 2  # ties everywhere
    bias = (torch.randn(spec.num_experts, generator=generator) * 2).round() / 8 if spec.correction_bias else None
    assert_equal_to_torch(torch.cat((smooth, coarse)).to(dtype), spec, bias)


@st.composite
def specs(draw: st.DrawFn) -> RouterSpec:
    score = draw(st.sampled_from(list(Score)))
    if score is Score.SPARSEMIXER:
        return RouterSpec(draw(st.integers(2, 20)), 2, score=score, nearness=draw(st.sampled_from([0.01, 0.3])))
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    top_groups = draw(st.integers(1, groups))
    return RouterSpec(
        groups * size,
        draw(st.integers(1, min(top_groups * size, 10))),
        score=score,
        correction_bias=draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(list(GroupScore))),
        normalize=draw(st.booleans()) and score is not Score.TOP_K_SOFTMAX,  # its weights may be sums near 0 otherwise
        eps=draw(st.sampled_from([0.0, 1e-20])),
        floor=draw(st.sampled_from([0.0, 0.25])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        capacity=draw(st.sampled_from([None, 1, 3])),
        weights_in_hidden_dtype=draw(st.booleans()),
    )


@settings(max_examples=25)
@given(specs(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_any_router_equals_torch(spec: RouterSpec, sequences: int, length: int, narrow: bool, seed: int) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(sequences * length, spec.num_experts, generator=generator) * 4).round() / 2
    # multiples of 1/4 but for sigmoid, where scores and biases never tie by accident
    bias = torch.randint(-4, 5, (spec.num_experts,), generator=generator) / 4 if spec.correction_bias else None
    assert_equal_to_torch(logits.to(dtype), spec, bias, length)


def test_logits_with_a_row_stride_are_read_where_they_lie() -> None:
    wide = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    spec = RouterSpec(8, 2)
    assert torch.equal(route_on_gpu(wide[:, 4:12], spec).experts.long(), route(wide[:, 4:12], spec).experts)
    turned = wide.t()[:8, :4].t()  # columns are not neighbours
    assert torch.equal(route_on_gpu(turned, spec).experts.long(), route(turned, spec).experts)


def test_experts_that_are_ruled_out_come_last_and_lowest_first() -> None:
    never = float("-inf")
    logits = torch.tensor([[never, 1.0, never, 2.0, never], [never] * 5])
    found = routed(logits, RouterSpec(5, 4))
    assert found.experts.tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]
    torch.testing.assert_close(found.weights[:1], route(logits[:1], RouterSpec(5, 4)).weights)
    assert found.weights[1].isnan().all()


@pytest.mark.parametrize("name", ROUTERS)
def test_nan_and_infinity_as_in_torch(name: str) -> None:
    """NaN is the greatest: chosen first, and its weight is NaN. Ids are those of different experts, whatever comes."""
    spec = ROUTERS[name]
    logits = torch.randn(7, spec.num_experts, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1, ::3], logits[2, -1] = float("nan"), float("nan"), float("nan")
    logits[3, 1], logits[4, 1], logits[5] = float("inf"), float("-inf"), -0.0
    logits[5, ::2] = 0.0  # equal to -0
    bias = torch.zeros(spec.num_experts) if spec.correction_bias else None
    found, wanted = routed(logits, spec, bias), route(logits, spec, bias)
    assert torch.equal(found.experts.long(), wanted.experts)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert found.weights[:3].isnan().any(dim=1).all()


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2"])
def test_nothing_is_read_beyond_the_end_of_a_bias_or_of_logits(name: str) -> None:
    """Neither 8 groups of 32 experts nor 384 experts, which are padded to 512. A read beyond ends the process."""
    spec = ROUTERS[name]
    logits, bias = torch.randn(3, spec.num_experts), torch.randn(spec.num_experts)
    found = route_on_gpu(before_a_wall(logits), spec, before_a_wall(bias))
    assert torch.equal(found.experts.long(), route(logits, spec, bias).experts)


def test_a_sequence_longer_than_a_tile_and_more_experts_than_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2 * 150, 40, generator=generator) * 2).round()
    assert_equal_to_torch(logits, RouterSpec(40, 2, capacity=5), None, 150)


def test_no_tokens_no_launch() -> None:
    found = routed(torch.zeros(0, 8), RouterSpec(8, 2, capacity=1))
    assert found.weights.shape == found.experts.shape == (0, 2)


def test_nothing_but_the_answer_is_written() -> None:
    with Canaries() as guard:
        weights, experts = guard.empty((5, 3), torch.float32), guard.empty((5, 3), torch.int32)
        launch_route(guard(torch.randn(5, 9)), RouterSpec(9, 3), None, weights, experts)
        launch_capacity(weights, experts, 1, 9, None)
    assert not weights.isnan().any()
