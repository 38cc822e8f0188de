"""Mixture-of-Experts layers that learn, each with its way to keep experts loaded.

All take hidden states [..., H] and return (output [..., H], `LayerReport`). Add the report's loss to the model's own.
Parameters are named as in transformers' sparse MoE blocks: `gate.weight`, `experts.gate_up_proj`, `experts.down_proj`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moehive.kernels.capacity import expert_capacity
from moehive.kernels.expert_choice import choose_tokens

from .configuration import Balance, MoEConfig
from .experts import RoutedExperts
from .gating import TopKGate
from .losses import expert_counts, router_loss, router_z_loss


class LayerReport(NamedTuple):
    """What one call of a layer did."""

    loss: Tensor  # scalar: auxiliary losses times their coefficients; 0 where there are none
    counts: Tensor  # [E] int64: how often each expert was chosen, dropped choices included
    dropped: Tensor  # scalar int64: choices that found no room; for expert choice: tokens that no expert chose


class MoELayer(nn.Module):
    """Tokens choose experts: without balancing, with an auxiliary loss, or as in Switch Transformers.

    Choices beyond an expert's capacity contribute nothing. Add the output to the layer's input, as transformers do, and
    a token without room passes by.

    >>> layer = MoELayer(MoEConfig(16, 32, num_experts=4, top_k=2, balance_coefficient=0.01))
    >>> output, report = layer(torch.randn(3, 5, 16))
    >>> output.shape, int(report.counts.sum()), report.loss.requires_grad
    (torch.Size([3, 5, 16]), 30, True)
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = TopKGate(
            config.hidden_size,
            config.router,
            capacity_factor=config.capacity_factor,
            eval_capacity_factor=config.eval_capacity_factor,
            jitter=config.jitter,
        )
        self.experts = RoutedExperts(
            config.hidden_size, config.intermediate_size, config.num_experts, config.activation
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, LayerReport]:
        """hidden [..., H] -> (output [..., H], report)."""
        rows = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        gating = self.gate(rows)
        output = self.experts(rows, gating.experts, gating.weights)
        counts = expert_counts(gating.chosen, self.config.num_experts)  # [E]
        loss = router_loss(
            gating.logits,
            counts,
            self.gate.spec.score,
            balance_coefficient=self.config.balance_coefficient,
            z_coefficient=self.config.z_coefficient,
        )
        dropped = (gating.experts == self.config.num_experts).sum()
        return output.view(hidden.shape), LayerReport(loss, counts, dropped)


class LossFreeMoELayer(MoELayer):
    """Tokens choose experts, balanced by a bias on the choice instead of a loss (arXiv 2408.15664; DeepSeek-V3).

    Call `update_bias()` after each optimizer step: the bias of experts with more than the mean load since the last
    update falls by `bias_update_rate`, that of experts with less rises by it.

    >>> config = MoEConfig(16, 32, num_experts=4, top_k=1, balance=Balance.LOSS_FREE, bias_update_rate=0.001)
    >>> layer = LossFreeMoELayer(config)
    >>> _, report = layer(torch.randn(1, 16))  # one expert has the one token
    >>> layer.update_bias()
    >>> layer.gate.e_score_correction_bias.sort().values
    tensor([-0.0010,  0.0010,  0.0010,  0.0010])
    """

    load: Tensor  # [E] int64: choices since the last update

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, LayerReport]:
        """hidden [..., H] -> (output [..., H], report)."""
        output, report = super().forward(hidden)
        if self.training:
            self.load += report.counts
        return output, report

    @torch.no_grad()
    def update_bias(self, load: Tensor | None = None) -> None:
        """Move each expert's bias by one step and forget the load.

        `load` [E] takes the place of what this process saw: with data parallelism, the sum of `self.load` over all
        ranks, so that their biases stay equal. Without any load nothing moves.
        """
        load = (self.load if load is None else load).double()
        bias = self.gate.e_score_correction_bias
        assert bias is not None
        bias += self.config.bias_update_rate * torch.sign(load.mean() - load)
        self.load.zero_()


class ExpertChoiceLayer(nn.Module):
    """Experts choose tokens: perfectly even load, a varying number of experts per token (arXiv 2202.09368).

    Each expert takes the share `top_k` / E of the call's tokens, those that score highest for it. Whether a token is
    taken depends on all tokens of the call, later ones too. That is not causal: a language model that is trained with
    it sees the future, and decoding one token at a time computes something else.

    >>> layer = ExpertChoiceLayer(MoEConfig(16, 32, num_experts=4, top_k=2, balance=Balance.EXPERT_CHOICE))
    >>> output, report = layer(torch.randn(10, 16))
    >>> output.shape, report.counts.tolist()
    (torch.Size([10, 16]), [5, 5, 5, 5])
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = RoutedExperts(
            config.hidden_size, config.intermediate_size, config.num_experts, config.activation
        )
        nn.init.normal_(self.gate.weight, std=config.hidden_size**-0.5)

    def forward(self, hidden: Tensor) -> tuple[Tensor, LayerReport]:
        """hidden [..., H] -> (output [..., H], report)."""
        rows, num_experts = hidden.reshape(-1, hidden.shape[-1]), self.config.num_experts  # [T, H]
        logits = self.gate(rows)  # [T, E]
        capacity = expert_capacity(rows.shape[0], num_experts, self.config.top_k, 1.0)
        choice = choose_tokens(logits, capacity)  # [E, C]
        token = choice.tokens.reshape(-1).long()  # [E * C]
        sizes = [capacity] * num_experts
        output = self.experts.run_grouped(rows, range(num_experts), sizes, token, choice.weights.reshape(-1))
        counts = torch.full((num_experts,), capacity, device=hidden.device)  # [E]
        dropped = (torch.bincount(token, minlength=rows.shape[0]) == 0).sum()
        coefficient = self.config.z_coefficient
        loss = coefficient * router_z_loss(logits) if coefficient else choice.weights.new_zeros(())
        return output.view(hidden.shape), LayerReport(loss, counts, dropped)


def build_layer(config: MoEConfig) -> MoELayer | ExpertChoiceLayer:
    """The layer that `config` describes, freshly initialised.

    >>> type(build_layer(MoEConfig(16, 32, num_experts=4, top_k=2, balance=Balance.LOSS_FREE))).__name__
    'LossFreeMoELayer'
    """
    if config.balance is Balance.EXPERT_CHOICE:
        return ExpertChoiceLayer(config)
    return LossFreeMoELayer(config) if config.balance is Balance.LOSS_FREE else MoELayer(config)
