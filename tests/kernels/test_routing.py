"""Row order against the mask that transformers' eager experts build."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.kernels.routing import group_by_expert, order_of_token


def eager_groups(top_k_index: Tensor, num_experts: int) -> list[tuple[int, list[int], list[int]]]:
    """transformers, `MixtralExperts.forward`: (expert, tokens, positions) in the order it visits them."""
    mask = torch.nn.functional.one_hot(top_k_index, num_classes=num_experts + 1).permute(2, 1, 0)
    groups = []
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        expert = int(hit[0])
        if expert != num_experts:
            position, token = torch.where(mask[expert])
            groups.append((expert, token.tolist(), position.tolist()))
    return groups


@st.composite
def routings(draw: st.DrawFn, max_tokens: int = 9) -> tuple[Tensor, int]:
    num_experts = draw(st.integers(1, 12))
    tokens, positions = draw(st.integers(1, max_tokens)), draw(st.integers(1, 5))
    index = st.integers(0, num_experts)  # the last one is the mask; repeats in a row are odd but legal
    rows = draw(st.lists(st.lists(index, min_size=positions, max_size=positions), min_size=tokens, max_size=tokens))
    return torch.tensor(rows), num_experts


@given(routings())
def test_groups_are_those_of_the_eager_mask(routing: tuple[Tensor, int]) -> None:
    top_k_index, num_experts = routing
    found = [(a.expert, a.token.tolist(), a.position.tolist()) for a in group_by_expert(top_k_index, num_experts)]
    assert found == eager_groups(top_k_index, num_experts)


@given(routings(max_tokens=1))
def test_order_of_one_token_is_that_of_the_eager_mask(routing: tuple[Tensor, int]) -> None:
    top_k_index, num_experts = routing
    wanted = [
        (expert, position) for expert, _, positions in eager_groups(top_k_index, num_experts) for position in positions
    ]
    assert order_of_token(top_k_index, num_experts) == wanted


def test_no_rows_no_groups() -> None:
    assert group_by_expert(torch.empty(0, 2, dtype=torch.int64), 4) == []
    assert order_of_token(torch.empty(1, 0, dtype=torch.int64), 4) == []


@pytest.mark.parametrize("odd", [-1, 5])
def test_an_index_outside_the_model_is_an_error(odd: int) -> None:
    with pytest.raises(ValueError, match=f"expert index {odd} of a model with 4"):
        group_by_expert(torch.tensor([[0, 1], [odd, 2]]), 4)
    with pytest.raises(ValueError, match=f"expert index {odd} of a model with 4"):
        order_of_token(torch.tensor([[0, odd]]), 4)


def test_the_rows_of_one_token_can_be_trained_with() -> None:
    """What is shared between calls may have been made while somebody generated."""
    with torch.inference_mode():
        group_by_expert(torch.tensor([[2, 0, 1]]), 4)
    hidden = torch.ones(1, 3, requires_grad=True)
    for one in group_by_expert(torch.tensor([[2, 0, 1]]), 4):
        (hidden.index_select(0, one.token) * hidden[0, one.position]).sum().backward()
    assert hidden.grad is not None
