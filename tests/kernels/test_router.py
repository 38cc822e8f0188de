"""Routing against transformers' own routers, family by family, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import build_config
from support.routers import (
    ALONE,
    ROUTER_FAMILIES,
    VARIANTS,
    TiedLogits,
    assert_same_routing,
    assert_ties_to_the_lowest,
    family_router,
    tied_logits,
    twin_experts,
)
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moehive.kernels.router import GroupScore, RouterSpec, Routing, Score, best, route, router_logits
from moehive.kernels.router_families import MODEL_TYPES, router_spec

TOKENS = 64


def hidden_states(size: int, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("family", ROUTER_FAMILIES)
def test_routing_equals_transformers(family: str) -> None:
    router = family_router(family)
    hidden = hidden_states(router.weight.shape[1])
    found = route(router.logits(hidden), router.spec, router.correction_bias, hidden_dtype=hidden.dtype)
    wanted = router.reference(hidden)
    assert found.weights.dtype == wanted.weights.dtype
    assert_same_routing(found, wanted, router.spec.num_experts)


@pytest.mark.parametrize("family", ROUTER_FAMILIES)
def test_ties_go_to_the_lowest_expert(family: str) -> None:
    router = family_router(family)
    twin_experts(router)
    hidden = hidden_states(router.weight.shape[1])
    logits = router.logits(hidden)
    found = route(logits, router.spec, router.correction_bias)
    assert_ties_to_the_lowest(found, router.reference(hidden), logits)


@pytest.mark.parametrize("family", ROUTER_FAMILIES)
def test_bf16_models_get_weights_of_the_same_dtype_and_bits(family: str) -> None:
    router = family_router(family, torch.bfloat16)
    hidden = hidden_states(router.weight.shape[1], torch.bfloat16)
    logits = router.logits(hidden)
    found = route(logits, router.spec, router.correction_bias, hidden_dtype=hidden.dtype)
    wanted = router.reference(hidden)
    assert found.weights.dtype == wanted.weights.dtype
    # logits of bf16 tie now and then, and torch.topk leaves open which of the equal ones it takes
    settled = (found.experts.sort(dim=1).values == wanted.experts.sort(dim=1).values).all(dim=1)
    assert settled.float().mean() > 0.9
    assert_same_routing(
        *(Routing(r.weights[settled], r.experts[settled]) for r in (found, wanted)), router.spec.num_experts
    )


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*ROUTER_FAMILIES, *VARIANTS])
def test_any_logits_ties_and_roundings_route_as_in_transformers(family: str, narrow: bool) -> None:
    """Every set and every weight, with transformers' choice among equals settled: the lowest."""
    dtype = torch.bfloat16 if narrow else torch.float32
    router = family_router(family, dtype)

    @settings(max_examples=10)
    @given(tied_logits())
    def check(drawn: TiedLogits) -> None:
        logits = drawn.apply(router)
        found = route(logits, router.spec, router.correction_bias, hidden_dtype=dtype)
        wanted = router.settled(logits)
        assert found.weights.dtype == wanted.weights.dtype
        assert_same_routing(found, wanted, router.spec.num_experts)

    check()


@pytest.mark.parametrize("family", ROUTER_FAMILIES)
def test_nan_and_infinity_end_where_transformers_leaves_them(family: str) -> None:
    """NaN is the greatest logit, as for torch.topk; what is not a number in transformers' weights is none in ours."""
    router = family_router(family)
    logits = torch.randn(5, router.spec.num_experts, generator=torch.Generator().manual_seed(0))
    logits[0, 2], logits[1] = float("nan"), float("nan")
    logits[2, 1], logits[3, 1], logits[4, :] = float("inf"), float("-inf"), float("-inf")
    found = route(logits, router.spec, router.correction_bias)
    wanted = router.settled(logits)
    assert torch.equal(found.weights.isnan().any(dim=1), wanted.weights.isnan().any(dim=1))
    assert found.weights[:2].isnan().any(dim=1).all()
    assert ((found.experts >= 0) & (found.experts < router.spec.num_experts)).all()
    assert (found.experts.sort(dim=1).values.diff(dim=1) > 0).all()
    number = ~wanted.weights.isnan().any(dim=1)
    ours, theirs = (Routing(r.weights[number], r.experts[number]) for r in (found, wanted))
    assert_same_routing(ours, theirs, router.spec.num_experts)


def test_every_family_that_is_known_is_compared() -> None:
    compared = {build_config(family).model_type for family in ROUTER_FAMILIES if family not in ALONE}
    same = {"kimi_k2", "qwen3_5_moe", "llama4"}  # other names of deepseek_v3, qwen3_5_moe_text and llama4_text
    assert set(MODEL_TYPES) == compared | set(ALONE) | same | {"switch_transformers"}


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_switch_routes_and_drops_as_transformers_does(capacity: int) -> None:
    config = SwitchTransformersConfig(d_model=32, num_experts=8, expert_capacity=capacity)
    module = SwitchTransformersTop1Router(config).eval()
    torch.nn.init.normal_(module.classifier.weight, std=0.3)
    hidden = hidden_states(32, tokens=2 * 24)
    with torch.no_grad():
        mask, probability, _ = module(hidden.view(2, 24, 32))  # [B, S, E], [B, S, 1]
    spec = router_spec(config)
    logits = router_logits(hidden, module.classifier.weight, spec).detach()
    found = route(logits, spec, sequence_length=24)
    kept = mask.sum(dim=-1).view(-1, 1)  # [T, 1]
    experts = torch.where(kept == 1, mask.argmax(dim=-1).view(-1, 1), 8)
    assert torch.equal(found.experts, experts)
    assert (found.weights - probability.view(-1, 1) * kept).abs().max() <= 1e-6
    assert (kept == 0).any() or capacity == 64


def test_equal_scores_of_padded_sizes() -> None:
    """All experts tie: the first ones are taken, also where groups are chosen first."""
    logits = torch.zeros(3, 12)
    assert route(logits, RouterSpec(12, 5)).experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    grouped = RouterSpec(12, 5, score=Score.SIGMOID, groups=3, top_groups=2)
    assert route(logits, grouped).experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    logits[:, 11] = 1.0  # the last group has the best expert, then the first by tie
    best_first = route(logits, RouterSpec(12, 5, groups=3, top_groups=2, group_score=GroupScore.MAX))
    assert best_first.experts.tolist() == [[11, 0, 1, 2, 3]] * 3


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6), min_size=1, max_size=5))
def test_best_is_a_stable_order(rows: list[list[float]]) -> None:
    for row, found in zip(rows, best(torch.tensor(rows), 4).tolist(), strict=True):
        assert found == sorted(range(6), key=lambda index: (-row[index], index))[:4]


def test_scores_that_rounding_made_equal_do_not_decide() -> None:
    logits = torch.tensor([[-200.0, 0.0, -199.0, -150.0]])  # all probabilities but one underflow to 0
    assert route(logits, RouterSpec(4, 3)).experts.tolist() == [[1, 3, 2]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 9}, "top_k 9 of 8 experts"),
        ({"top_k": 0}, "top_k 0 of 8 experts"),
        ({"groups": 3}, "of 3 groups of 8 experts"),
        ({"groups": 4, "top_groups": 5}, "the best 5 of 4 groups"),
        ({"groups": 4, "top_groups": 1, "top_k": 3}, "top_k 3 of 1 groups with 2 experts each"),
        ({"groups": 8, "top_groups": 4}, "no second best"),
        ({"score": Score.SPARSEMIXER, "top_k": 3}, "chooses two experts"),
        ({"capacity": 0}, "capacity 0 is less than one token"),
    ],
)
def test_a_router_that_cannot_be_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**({"num_experts": 8, "top_k": 2} | wrong))  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_refused() -> None:
    plain, biased = RouterSpec(8, 2), RouterSpec(8, 2, correction_bias=True)
    logits = torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"logits \(6, 7\) are not \[T, 8\]"):
        route(logits[:, :7], plain)
    with pytest.raises(ValueError, match="has no correction bias"):
        route(logits, plain, torch.zeros(8))
    with pytest.raises(ValueError, match="needs a correction bias"):
        route(logits, biased)
    with pytest.raises(ValueError, match=r"correction bias \(7,\) is not \[8\]"):
        route(logits, biased, torch.zeros(7))
    with pytest.raises(ValueError, match="6 tokens are not sequences of 4"):
        route(logits, plain, sequence_length=4)


def test_autocast_does_not_narrow_logits_that_are_to_be_exact() -> None:
    hidden, weight = hidden_states(16), torch.randn(8, 16)
    exact, plain = RouterSpec(8, 2, float32_logits=True), RouterSpec(8, 2)
    wanted = router_logits(hidden, weight, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router_logits(hidden, weight, exact), wanted)
        assert router_logits(hidden, weight, plain).dtype == torch.bfloat16


def test_no_tokens_no_choices() -> None:
    found = route(torch.zeros(0, 8), RouterSpec(8, 2, capacity=1))
    assert found.weights.shape == found.experts.shape == (0, 2)


def test_families_that_are_not_known_are_refused() -> None:
    class Config:
        model_type = "dense"

    with pytest.raises(ValueError, match="no router is known for model type 'dense'"):
        router_spec(Config())
