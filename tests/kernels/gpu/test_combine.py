"""Sums over experts: against fp64, the same bits in whatever order experts are named, and only of what was written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canaries import Canaries
from torch import Tensor

pytest.importorskip("triton")
from moehive.kernels.combine import weighted_sum
from moehive.kernels.gpu.combine import combine
from moehive.kernels.routing import group_by_expert

pytestmark = pytest.mark.interpreted


def distinct_experts(tokens: int, top_k: int, num_experts: int, generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)])


def combined(outputs: Tensor, experts: Tensor, num_experts: int, **options: object) -> Tensor:
    """`combine` with every buffer watched."""
    with Canaries() as guard, guard.allocations():
        watched = {k: guard(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        return combine(guard(outputs), guard(experts), num_experts, **watched)  # type: ignore[arg-type]


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 5), top_k=st.integers(1, 6), hidden=st.sampled_from([1, 40, 513]), splits=st.integers(1, 3),
    weighted=st.booleans(), mapped=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_a_sum_in_fp64(
    tokens: int, top_k: int, hidden: int, splits: int, weighted: bool, mapped: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = distinct_experts(tokens, top_k, 8, generator)
    experts[torch.rand(tokens, top_k, generator=generator) < 0.2] = 8  # dropped
    expert_map = torch.where(torch.rand(8, generator=generator) < 0.5, -1, 0).int() if mapped else None
    weights = torch.rand(tokens, top_k, generator=generator) if weighted else None
    outputs = torch.randn(splits, tokens * top_k, hidden, generator=generator).to(dtype)
    here = experts < 8 if expert_map is None else torch.cat((expert_map, torch.tensor([-1])))[experts] >= 0
    outputs[:, ~here.flatten()] = float("nan")  # nobody wrote them
    terms = outputs.double().sum(0).view(tokens, top_k, hidden) * (1.0 if weights is None else weights[..., None])
    exact = torch.where(here[..., None], terms, 0.0).sum(1)
    given_rows = outputs if splits > 1 else outputs[0]
    found = combined(given_rows, experts, 8, expert_map=expert_map, weights=weights, dtype=torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    rounded = combined(given_rows, experts, 8, expert_map=expert_map, weights=weights)
    assert torch.equal(rounded, found.to(dtype))


@given(st.permutations(range(5)), st.integers(0, 99))
@settings(max_examples=15)
def test_the_order_of_positions_does_not_change_a_bit(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts, weights = distinct_experts(3, 5, 9, generator), torch.rand(3, 5, generator=generator)
    outputs = torch.randn(3, 5, 30, generator=generator) * 10.0 ** torch.randint(-3, 4, (3, 5, 1), generator=generator)
    before = combined(outputs.view(15, 30), experts, 9, weights=weights)
    after = combined(outputs[:, order].reshape(15, 30), experts[:, order], 9, weights=weights[:, order].contiguous())
    assert torch.equal(before, after)


def test_the_order_is_that_of_the_sum_on_the_processor() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, weights = distinct_experts(6, 4, 9, generator), torch.rand(6, 4, generator=generator)
    outputs = torch.randn(24, 20, generator=generator)
    terms = [
        (group.token, outputs[group.token * 4 + group.position], weights[group.token, group.position])
        for group in group_by_expert(experts, 9)
    ]
    assert torch.equal(combined(outputs, experts, 9, weights=weights), weighted_sum(terms, (6, 20), torch.float32))


def test_tokens_without_a_row_get_zeros() -> None:
    outputs = torch.full((4, 8), float("nan"))
    assert torch.equal(combined(outputs, torch.full((2, 2), 3), 3), torch.zeros(2, 8))
    assert combined(outputs[:0], torch.zeros(0, 2, dtype=torch.int64), 3).shape == (0, 8)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows are not 2 for each of 2 tokens"):
        combine(torch.zeros(5, 8), torch.zeros(2, 2, dtype=torch.int64), 3)
