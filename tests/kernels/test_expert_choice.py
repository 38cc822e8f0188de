"""Experts that choose tokens, against sorting by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels.expert_choice import choose_tokens


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_every_expert_takes_its_best_tokens(tokens: int, num_experts: int, data: st.DataObject) -> None:
    row = st.lists(st.sampled_from([-2.0, 0.0, 1.0]), min_size=num_experts, max_size=num_experts)
    logits = torch.tensor(data.draw(st.lists(row, min_size=tokens, max_size=tokens)))
    capacity = data.draw(st.integers(1, tokens))
    choice = choose_tokens(logits, capacity)
    scores = logits.softmax(dim=-1)
    for expert in range(num_experts):
        order = sorted(range(tokens), key=lambda token: (-float(scores[token, expert]), token))
        assert choice.tokens[expert].tolist() == sorted(order[:capacity])
        assert torch.equal(choice.weights[expert], scores[choice.tokens[expert], expert])


def test_the_weights_have_gradients() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: choose_tokens(x, 2).weights, (logits,))


@pytest.mark.parametrize("capacity", [0, 7])
def test_impossible_capacities_are_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"cannot take {capacity} tokens each"):
        choose_tokens(torch.zeros(6, 3), capacity)
