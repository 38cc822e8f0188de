"""transformers' own routers, taken out of the tiny models of every family: what ours are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.families import build_model
from torch import Tensor

from moehive.kernels.router import RouterSpec, Routing, router_logits
from moehive.kernels.router_families import router_spec

_NAMES = ("TopKRouter", "TopkRouter", "TokenChoiceRouter")


@dataclass(frozen=True)
class FamilyRouter:
    """The last router of one model. All tensors belong to transformers' modules: changing them changes `reference`."""

    spec: RouterSpec
    weight: Tensor  # [E, H]
    bias: Tensor | None  # [E], of the linear layer
    correction_bias: Tensor | None  # [E]
    call: Callable[[Tensor], Any]

    def logits(self, hidden: Tensor) -> Tensor:
        """Our linear layer: hidden [T, H] -> [T, E]."""
        return router_logits(hidden, self.weight, self.spec, self.bias)

    @torch.no_grad()
    def reference(self, hidden: Tensor) -> Routing:
        """What transformers chooses for hidden [T, H]."""
        _, weights, experts = self.call(hidden)
        return Routing(weights, experts)


def family_router(family: str, dtype: torch.dtype = torch.float32) -> FamilyRouter:
    """The router of one family's tiny model."""
    model = build_model(family, dtype)
    name, router = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith(_NAMES)][-1]
    owners = [router, model.get_submodule(name.rpartition(".")[0]), getattr(router, "moe_statics", None)]
    biases = (getattr(owner, n, None) for owner in owners for n in ("e_score_correction_bias", "expert_bias"))
    correction = next((bias for bias in biases if bias is not None), None)

    def call(hidden: Tensor) -> Any:
        takes_bias = len(inspect.signature(router.forward).parameters) == 2
        rows = hidden[None] if family == "afmoe" else hidden  # it wants [B, S, H]
        return router(rows, correction) if takes_bias else router(rows)

    linear = router.gate if family == "afmoe" else router
    flat = None if correction is None else correction.detach().view(-1)
    bias = getattr(linear, "bias", None)
    return FamilyRouter(
        router_spec(model.config), linear.weight.detach(), None if bias is None else bias.detach(), flat, call
    )


def by_expert(routing: Routing, num_experts: int) -> Tensor:
    """The weight of every expert for every token, [T, E + 1]; the last one is for choices that were dropped."""
    empty = torch.zeros(routing.weights.shape[0], num_experts + 1)
    return empty.scatter_add(1, routing.experts.long(), routing.weights.float())


def assert_same_routing(found: Routing, wanted: Routing, num_experts: int) -> None:
    """The same sets of experts with the same weights, in whatever order."""
    assert torch.equal(found.experts.long().sort(dim=1).values, wanted.experts.long().sort(dim=1).values)
    difference = by_expert(found, num_experts) - by_expert(wanted, num_experts)
    assert difference.abs().max() <= 1e-6


def twin_experts(router: FamilyRouter) -> None:
    """Give experts 2i and 2i + 1 equal logits and biases, so that every choice meets ties."""
    for tensor in (router.weight, router.bias, router.correction_bias):
        if tensor is not None:
            tensor[1::2] = tensor[::2]


def assert_ties_to_the_lowest(found: Routing, wanted: Routing, logits: Tensor) -> None:
    """With twin experts: as good as what transformers chose, and of twins the first."""
    for routing in (found, wanted):
        assert (routing.experts.long().sort(dim=1).values.diff(dim=1) > 0).all()
    kinds = [torch.sort(logits.float().gather(1, routing.experts.long()), dim=1).values for routing in (found, wanted)]
    assert torch.equal(*kinds)
    weights = [torch.sort(routing.weights.float(), dim=1).values for routing in (found, wanted)]
    assert (weights[0] - weights[1]).abs().max() <= 1e-6
    chosen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, found.experts.long(), True)
    assert (chosen[:, ::2] | ~chosen[:, 1::2]).all()
