"""Who finds room, against a count by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.kernels.capacity import drop_late, expert_capacity, limit_to_capacity


def kept_by_hand(experts: Tensor, capacity: int, num_experts: int, length: int) -> list[list[bool]]:
    """One choice after the other: first choices before second ones, earlier tokens before later ones."""
    tokens, top_k = experts.shape
    kept = [[False] * top_k for _ in range(tokens)]
    for start in range(0, tokens, length):
        room = [capacity] * num_experts + [0]
        for position in range(top_k):
            for token in range(start, start + length):
                expert = int(experts[token, position])
                kept[token][position] = room[expert] > 0
                room[expert] -= 1
    return kept


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_capacity_by_hand(
    data: st.DataObject, sequences: int, length: int, top_k: int, num_experts: int, capacity: int
) -> None:
    row = st.lists(st.integers(0, num_experts), min_size=top_k, max_size=top_k)
    count = sequences * length
    experts = torch.tensor(data.draw(st.lists(row, min_size=count, max_size=count)))
    wanted = kept_by_hand(experts, capacity, num_experts, length)
    assert limit_to_capacity(experts, capacity, num_experts, length).tolist() == wanted
    whole = limit_to_capacity(experts, capacity, num_experts).tolist()
    assert whole == kept_by_hand(experts, capacity, num_experts, count)


def test_what_is_dropped_has_no_weight_and_no_expert() -> None:
    experts, weights = torch.tensor([[0, 1], [0, 1], [1, 0]]), torch.full((3, 2), 0.5, requires_grad=True)
    kept, left = drop_late(weights, experts, 2, 2)
    assert left.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert kept.tolist() == [[0.5, 0.5], [0.5, 0.0], [0.5, 0.0]]
    kept.sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(("tokens", "factor", "wanted"), [(16, 1.0, 4), (16, 1.25, 5), (17, 1.0, 5), (1, 0.1, 1)])
def test_capacity_is_a_share_rounded_up(tokens: int, factor: float, wanted: int) -> None:
    assert expert_capacity(tokens, 8, 2, factor) == wanted
