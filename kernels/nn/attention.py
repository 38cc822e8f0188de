"""Attention whose heads belong to experts: each token attends with the heads of the experts that it is routed to.

After Mixture of Attention Heads (arXiv 2210.05144): every expert owns a group of query heads and their part of the
output projection; keys and values are computed once and shared. A token costs `top_k` groups of heads, however many
experts there are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moehive.kernels.router import RouterSpec, best

from .gating import Gating, TopKGate
from .layers import LayerReport
from .losses import expert_counts, router_loss


class SparseExpertAttention(nn.Module):
    """Causal (or full) attention with routed heads, for training and for whole sequences; it keeps no cache.

    hidden_size: H. num_experts: E. top_k: experts of one token. heads: query heads of one expert, and of the shared
    keys and values. head_dim: D, by default such that the heads of a token's experts span H together.
    capacity_factor: an expert attends for this many times an even share of the tokens of one call; None: for all.
      `eval_capacity_factor`: the same outside training.
    balance_coefficient, z_coefficient: of the report's loss, as in `MoEConfig`.

    Raises ValueError for sizes that do not go together.

    >>> attention = SparseExpertAttention(hidden_size=64, num_experts=8, top_k=2, heads=2, capacity_factor=1.25)
    >>> output, report = attention(torch.randn(3, 10, 64))
    >>> output.shape, attention.head_dim, int(report.counts.sum())
    (torch.Size([3, 10, 64]), 16, 60)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        causal: bool = True,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        balance_coefficient: float = 0.01,
        z_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        # a single weight is not normalised: it would always be 1, and the router would learn nothing
        spec = RouterSpec(num_experts, top_k, normalize=top_k > 1, weights_in_hidden_dtype=True)
        if heads < 1 or (head_dim is not None and head_dim < 1):
            raise ValueError(f"an expert cannot have {heads} heads of size {head_dim}")
        self.heads = heads
        self.head_dim = max(hidden_size // (top_k * heads), 1) if head_dim is None else head_dim
        self.causal = causal
        self.balance_coefficient = balance_coefficient
        self.z_coefficient = z_coefficient
        self.gate = TopKGate(
            hidden_size, spec, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor
        )
        width = self.heads * self.head_dim  # of one expert
        self.query = nn.Parameter(torch.empty(num_experts, width, hidden_size))  # [E, h * D, H]
        self.output = nn.Parameter(torch.empty(num_experts, hidden_size, width))  # [E, H, h * D]
        self.key_value = nn.Linear(hidden_size, 2 * width, bias=False)
        nn.init.normal_(self.query, std=hidden_size**-0.5)
        nn.init.normal_(self.output, std=width**-0.5)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, LayerReport]:
        """hidden [B, S, H] -> (output [B, S, H], report).

        `rotary` is (cosine, sine), each [S, D], for rotary position embeddings as transformers applies them to halves.
        """
        gating = self.gate(hidden.flatten(0, 1))  # T = B * S tokens
        key, value = self.key_value(hidden).chunk(2, dim=-1)  # [B, S, h * D] each
        key, value = (self._by_head(part) for part in (key, value))  # [B, S, h, D]
        if rotary is not None:
            key = rotate(key, *(part[:, None] for part in rotary))
        key, value = key.transpose(1, 2), value.transpose(1, 2)  # [B, h, S, D]
        output = torch.zeros_like(hidden)
        experts, weights = (part.view(*hidden.shape[:2], -1) for part in (gating.experts, gating.weights))  # [B, S, K]
        for expert, projections in enumerate(zip(self.query.unbind(), self.output.unbind(), strict=True)):
            mine = experts == expert  # [B, S, K]
            share = torch.where(mine, weights, 0.0).sum(dim=-1)  # [B, S]
            output = self._add_expert(output, hidden, (key, value), mine.any(dim=-1), share, projections, rotary)
        return output, self._report(gating)

    def _add_expert(
        self,
        output: Tensor,
        hidden: Tensor,
        key_value: tuple[Tensor, Tensor],
        taken: Tensor,
        share: Tensor,
        projections: tuple[Tensor, Tensor],
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """output [B, S, H] plus one expert's heads, times share [B, S], for the tokens that are taken [B, S].

        Every sequence has C places, as many as the fullest needs; the rest are padding, with share 0.
        """
        places = int(taken.sum(dim=1).max())
        if not places:
            return output
        at = best(taken.int(), places)  # [B, C] the positions, in order, then padding
        rows = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))  # [B, C, H]
        query = self._by_head(F.linear(rows, projections[0]))  # [B, C, h, D]
        if rotary is not None:
            query = rotate(query, *(part[at][:, :, None] for part in rotary))
        mask = None
        if self.causal:
            mask = (torch.arange(hidden.shape[1], device=at.device) <= at[..., None])[:, None]  # [B, 1, C, S]
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), *key_value, attn_mask=mask)  # [B, h, C, D]
        row = F.linear(attended.transpose(1, 2).flatten(2), projections[1])  # [B, C, H]
        weighted = row * share.gather(1, at)[..., None]  # 0 for padding
        return output.scatter_add(1, at[..., None].expand_as(row), weighted)

    def _by_head(self, x: Tensor) -> Tensor:
        """[..., h * D] -> [..., h, D]."""
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def _report(self, gating: Gating) -> LayerReport:
        num_experts = self.gate.spec.num_experts
        counts = expert_counts(gating.chosen, num_experts)
        coefficients = {"balance_coefficient": self.balance_coefficient, "z_coefficient": self.z_coefficient}
        loss = router_loss(gating.logits, counts, self.gate.spec.score, **coefficients)
        return LayerReport(loss, counts, (gating.experts == num_experts).sum())


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., D] turned by its position; cosine and sine broadcast to x (RoFormer; transformers, `rotate_half`)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
