"""The routing kernels under the interpreter: against transformers' routers, and against ours in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canaries import Canaries
from support.families import EXTRA_FAMILIES, FAMILIES
from support.routers import assert_same_routing, assert_ties_to_the_lowest, family_router, twin_experts
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


@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES)
def test_routing_equals_transformers_ties_included(family: str) -> None:
    router = family_router(family)
    hidden = torch.randn(7, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    found = routed(router.logits(hidden), router.spec, router.correction_bias)
    assert_same_routing(found, router.reference(hidden), router.spec.num_experts)
    twin_experts(router)
    logits = router.logits(hidden)
    found = routed(logits, router.spec, router.correction_bias)
    assert_ties_to_the_lowest(found, router.reference(hidden), logits)


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
def test_nan_never_becomes_an_id_outside_the_model(name: str) -> None:
    spec = ROUTERS[name]
    logits = torch.randn(3, spec.num_experts, generator=torch.Generator().manual_seed(0))
    logits[0], logits[1, ::3] = float("nan"), float("nan")
    bias = torch.zeros(spec.num_experts) if spec.correction_bias else None
    experts = routed(logits, spec, bias).experts
    assert ((experts >= 0) & (experts < spec.num_experts)).all()
    assert torch.equal(experts[2].long(), route(logits[2:], spec, bias).experts[0])


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
