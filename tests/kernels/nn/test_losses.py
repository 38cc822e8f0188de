"""Balancing losses against transformers' and their definitions."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moehive.kernels.nn import expert_counts, expert_probabilities, load_balancing_loss, router_loss, router_z_loss
from moehive.kernels.router import Score


def logits(tokens: int = 50, num_experts: int = 8) -> torch.Tensor:
    return torch.randn(tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def test_the_balancing_loss_is_that_of_transformers_over_top_k() -> None:
    x = logits()
    counts = expert_counts(x.topk(2, dim=-1).indices, 8)
    found = load_balancing_loss(expert_probabilities(x, Score.SOFTMAX), counts)
    wanted = load_balancing_loss_func((x,), num_experts=8, top_k=2)
    assert float(found) == pytest.approx(float(wanted) / 2)


def test_even_load_costs_one_and_a_single_expert_costs_e() -> None:
    even = torch.full((16, 4), 0.25)
    assert float(load_balancing_loss(even, torch.tensor([8, 8, 8, 8]))) == pytest.approx(1.0)
    single = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(16, 4)
    assert float(load_balancing_loss(single, torch.tensor([32, 0, 0, 0]))) == pytest.approx(4.0)


def test_dropped_choices_are_not_counted() -> None:
    assert expert_counts(torch.tensor([[0, 2], [3, 2], [3, 3]]), 3).tolist() == [1, 0, 2]


def test_sigmoid_scores_become_shares() -> None:
    shares = expert_probabilities(logits(), Score.SIGMOID)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(shares, logits().sigmoid() / logits().sigmoid().sum(dim=-1, keepdim=True))


def test_the_z_loss_is_the_mean_square_of_log_sum_exp() -> None:
    assert float(router_z_loss(logits())) == pytest.approx(float(logits().exp().sum(dim=-1).log().square().mean()))


def test_coefficients_switch_the_losses() -> None:
    x, counts = logits(), torch.arange(8)
    both = router_loss(x, counts, Score.SOFTMAX, balance_coefficient=0.5, z_coefficient=0.25)
    balance = load_balancing_loss(x.softmax(dim=-1), counts)
    torch.testing.assert_close(both, 0.5 * balance + 0.25 * router_z_loss(x))
    assert float(router_loss(x, counts, Score.SOFTMAX, balance_coefficient=0.0, z_coefficient=0.0)) == 0.0


@pytest.mark.parametrize("score", [Score.SOFTMAX, Score.SIGMOID])
def test_gradients(score: Score) -> None:
    counts = expert_counts(logits(6).topk(2, dim=-1).indices, 8)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return router_loss(x, counts, score, balance_coefficient=1.0, z_coefficient=0.1)

    assert torch.autograd.gradcheck(loss, (logits(6).requires_grad_(),))
