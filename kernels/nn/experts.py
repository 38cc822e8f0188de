"""Routed feed-forward experts that learn: one matrix product per expert that has rows, over just its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import group_by_expert


class RoutedExperts(nn.Module):
    """`num_experts` gated feed-forward networks. Parameters as in transformers: gate_up_proj [E, 2I, H], down_proj
    [E, H, I].

    hidden_size: H. intermediate_size: I. activation: of the gate, a name in `moehive.kernels.expert_ffn.ACTIVATIONS`.

    >>> experts = RoutedExperts(hidden_size=16, intermediate_size=32, num_experts=4)
    >>> chosen = torch.tensor([[0, 3], [3, 4]])  # 4: left out
    >>> experts(torch.randn(2, 16), chosen, torch.tensor([[0.7, 0.3], [0.9, 0.0]])).shape
    torch.Size([2, 16])
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, activation: str = "silu") -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ffn = FfnSpec(activation=activation)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=intermediate_size**-0.5)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], experts and weights [T, K] -> [T, H]; the expert id E is left out.

        On a GPU the sizes of the groups are waited for.
        """
        groups = group_by_expert(experts, self.num_experts)
        if not groups:
            return torch.zeros_like(hidden)
        token = torch.cat([group.token for group in groups])  # [R]
        position = torch.cat([group.position for group in groups])  # [R]
        sizes = [group.token.shape[0] for group in groups]
        return self.run_grouped(hidden, [group.expert for group in groups], sizes, token, weights[token, position])

    def run_grouped(
        self, hidden: Tensor, experts: Sequence[int], sizes: Sequence[int], token: Tensor, weights: Tensor
    ) -> Tensor:
        """hidden [T, H] -> [T, H]: `experts` each take the next of `sizes` rows of token [R], with weights [R].

        Rows are gathered once and added once, so that the backward pass, too, touches each row and each active expert
        once.
        """
        rows = torch.split(hidden.index_select(0, token), list(sizes))
        gate_up, down = self.gate_up_proj.unbind(), self.down_proj.unbind()  # indexing would make E full-size gradients
        outputs = [
            expert_ffn(part, ExpertWeights(gate_up[expert], down[expert]), self.ffn)
            for expert, part in zip(experts, rows, strict=True)
        ]
        weighted = torch.cat(outputs) * weights[:, None]  # [R, H]
        return torch.zeros_like(hidden).index_add(0, token, weighted.to(hidden.dtype))
