"""The router as a module: a linear layer, the choice, and what disturbs or limits it while training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moehive.kernels.capacity import drop_late, expert_capacity
from moehive.kernels.router import RouterSpec, route, router_logits


class Gating(NamedTuple):
    """What the gate decided for T tokens."""

    weights: Tensor  # [T, K], 0 for a choice that was dropped
    experts: Tensor  # [T, K] int64, num_experts for a choice that was dropped
    logits: Tensor  # [T, E]
    chosen: Tensor  # [T, K] int64, before any was dropped


class TopKGate(nn.Module):
    """Chooses `spec.top_k` experts for each token. The choice has no gradient, the weights have.

    hidden_size: H.
    spec: how experts are chosen and weighted (`moehive.kernels.router.RouterSpec`); its own capacity must be None.
    capacity_factor: an expert takes this many times an even share of the tokens of one call, and drops the rest,
      later tokens first; None for no limit. `eval_capacity_factor` is the one outside training.
    jitter: while training, inputs of the router are multiplied by uniform noise from [1 - jitter, 1 + jitter]
      (Switch Transformers).

    The weight's name and shape, [E, H], are those of transformers' routers. A correction bias, where the spec has one,
    is the buffer `e_score_correction_bias` [E], as in transformers' DeepSeek-V3.

    >>> gate = TopKGate(16, RouterSpec(num_experts=4, top_k=2, normalize=True), capacity_factor=1.0)
    >>> gating = gate(torch.randn(10, 16))  # 10 * 2 choices, 5 for each expert
    >>> gating.experts.shape, int(torch.bincount(gating.experts.flatten(), minlength=5)[:4].max()) <= 5
    (torch.Size([10, 2]), True)
    """

    def __init__(
        self,
        hidden_size: int,
        spec: RouterSpec,
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if spec.capacity is not None:
            raise ValueError("a gate's capacity follows from its capacity_factor; the spec's must be None")
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"jitter {jitter} is not in [0, 1)")
        self.spec = spec
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))  # [E, H]
        self.e_score_correction_bias: Tensor | None
        self.register_buffer("e_score_correction_bias", torch.zeros(spec.num_experts) if spec.correction_bias else None)
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: Tensor) -> Gating:
        """hidden [T, H] -> decisions for T tokens."""
        if self.training and self.jitter:
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router_logits(hidden, self.weight, self.spec)  # [T, E]
        routing = route(logits, self.spec, self.e_score_correction_bias, hidden_dtype=hidden.dtype)
        chosen = routing.experts.long()  # [T, K]
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return Gating(routing.weights, chosen, logits, chosen)
        capacity = expert_capacity(hidden.shape[0], self.spec.num_experts, self.spec.top_k, factor)
        return Gating(*drop_late(routing.weights, chosen, capacity, self.spec.num_experts), logits, chosen)
