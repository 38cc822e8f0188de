"""What keeps experts evenly loaded and router logits small while training. Scalars, to be added to the model's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moehive.kernels.router import Score


def expert_counts(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen: experts [T, K] -> [E] int64; the id `num_experts` (dropped) is not counted.

    >>> expert_counts(torch.tensor([[0, 2], [2, 3]]), num_experts=3)
    tensor([1, 0, 2])
    """
    return torch.bincount(experts.reshape(-1), minlength=num_experts + 1)[:num_experts]


def expert_probabilities(logits: Tensor, score: Score) -> Tensor:
    """Router logits [T, E] as shares that sum to 1, in fp32 at least; sigmoid scores divided by their sum.

    >>> expert_probabilities(torch.zeros(1, 4), Score.SIGMOID)
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score is not Score.SIGMOID:
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


def load_balancing_loss(probabilities: Tensor, counts: Tensor) -> Tensor:
    """The auxiliary loss of Switch Transformers (arXiv 2101.03961, equation 4): 1 when the load is even, at most E.

    `probabilities` [T, E] are the router's, `counts` [E] how often each expert was chosen. The loss is E times the sum
    over experts of share of the choices times mean probability; its gradient flows through the probabilities only.
    (transformers' loss of the same name is top_k times as large.)

    >>> load_balancing_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), counts=torch.tensor([2, 0]))
    tensor(2.)
    """
    share = counts / counts.sum().clamp(min=1)  # [E]
    return probabilities.shape[1] * (share * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean square of log sum exp of the router logits [T, E] (ST-MoE, arXiv 2202.08906, equation 5).

    >>> router_z_loss(torch.tensor([[-0.6931, -0.6931]])).abs() < 1e-6
    tensor(True)
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=-1).square().mean()


def router_loss(
    logits: Tensor, counts: Tensor, score: Score, *, balance_coefficient: float, z_coefficient: float
) -> Tensor:
    """Both of the above times their coefficients, for logits [T, E] and counts [E]; 0 without coefficients.

    >>> logits, counts = torch.zeros(3, 4), torch.tensor([3, 0, 0, 0])
    >>> router_loss(logits, counts, Score.SOFTMAX, balance_coefficient=0.01, z_coefficient=0.0)
    tensor(0.0100)
    """
    loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
    if balance_coefficient:
        loss = loss + balance_coefficient * load_balancing_loss(expert_probabilities(logits, score), counts)
    if z_coefficient:
        loss = loss + z_coefficient * router_z_loss(logits)
    return loss
