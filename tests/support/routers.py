"""transformers' own routers, taken out of the tiny models of every family: what ours are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from hypothesis import strategies as st
from support.families import DISTINCT, EXTRA_FAMILIES, build_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router

from moehive.kernels.router import RouterSpec, Routing, router_logits
from moehive.kernels.router_families import router_spec

_NAMES = ("TopKRouter", "TopkRouter", "TokenChoiceRouter")
ALONE = ("granitemoe", "llama4_text")  # made without a model around them
ROUTER_FAMILIES: tuple[str, ...] = (*DISTINCT, *EXTRA_FAMILIES, *ALONE)

# name -> (family, what its configuration says otherwise than the tiny checkpoint's)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, raw": ("qwen3_moe", {"norm_topk_prob": False}),
    "olmoe, normalized": ("olmoe", {"norm_topk_prob": True}),
    "mixtral, all": ("mixtral", {"num_experts_per_tok": 8}),
    "mixtral, one": ("mixtral", {"num_experts_per_tok": 1}),
    "gpt_oss, 32": ("gpt_oss", {"num_local_experts": 32}),
    "phimoe, wide": ("phimoe", {"router_jitter_noise": 0.2, "num_local_experts": 16}),
    "deepseek_v2, greedy": ("deepseek_v2", {"topk_method": "greedy", "routed_scaling_factor": 2.0}),
    "deepseek_v2, 24": ("deepseek_v2", {"n_routed_experts": 24, "n_group": 8, "topk_group": 3}),  # groups of 3
    "deepseek_v3, raw": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "deepseek_v3, 48": ("deepseek_v3", {"n_routed_experts": 48, "n_group": 4, "topk_group": 1}),  # groups of 12
    "kimi_k2, 48": ("kimi_k2", {"n_routed_experts": 48, "num_experts_per_tok": 8}),
    "ernie4_5_moe, floor": ("ernie4_5_moe", {"moe_norm_min": 0.5}),
}


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
        return self._routing(self.call(hidden))

    @torch.no_grad()
    def settled(self, logits: Tensor) -> Routing:
        """What transformers chooses for logits [T, E], were its linear layer to find them, with ties to the lowest."""
        with _Settled(logits):
            return self._routing(self.call(torch.zeros(logits.shape[0], self.weight.shape[1], dtype=self.weight.dtype)))

    def _routing(self, found: Any) -> Routing:
        if len(found) == 3:
            return Routing(found[1], found[2])
        scores, logits = found  # Llama-4: scores are [T, E], 0 where an expert is not chosen
        experts = torch.topk(logits, self.spec.top_k, dim=1).indices
        return Routing(scores.gather(1, experts), experts)


class _Settled(TorchFunctionMode):
    """Linear layers find the given logits, in the dtype that they compute in, and top-k takes the lowest of equals.

    torch.topk leaves open which of equal elements it takes, and takes others in other sizes.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._logits = logits

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._logits.to(args[0].dtype)
        if func in (torch.topk, Tensor.topk):
            count = args[1] if len(args) > 1 else kwargs["k"]
            assert kwargs.get("dim", -1) in (-1, args[0].ndim - 1)
            values, indices = args[0].sort(dim=-1, descending=True, stable=True)
            return torch.return_types.topk((values[..., :count], indices[..., :count]))  # type: ignore[attr-defined]
        return func(*args, **kwargs)


def family_router(family: str, dtype: torch.dtype = torch.float32) -> FamilyRouter:
    """The router of one family's tiny model, or of one of VARIANTS."""
    family, changes = VARIANTS.get(family, (family, {}))
    config, router, correction = (
        _lone_router(family, dtype) if family in ALONE else _model_router(family, dtype, changes)
    )

    def call(hidden: Tensor) -> Any:
        takes_bias = len(inspect.signature(router.forward).parameters) == 2
        rows = hidden[None] if family == "afmoe" else hidden  # it wants [B, S, H]
        return router(rows, correction) if takes_bias else router(rows)

    linear = router.gate if family == "afmoe" else router
    flat = None if correction is None else correction.detach().view(-1)
    bias = getattr(linear, "bias", None)
    return FamilyRouter(
        router_spec(config), linear.weight.detach(), None if bias is None else bias.detach(), flat, call
    )


def _model_router(family: str, dtype: torch.dtype, changes: Mapping[str, Any]) -> tuple[Any, Any, Tensor | None]:
    """The last router of the model, with the configuration and the correction bias."""
    model = build_model(family, dtype, **changes)
    name, router = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith(_NAMES)][-1]
    owners = [router, model.get_submodule(name.rpartition(".")[0]), getattr(router, "moe_statics", None)]
    biases = (getattr(owner, n, None) for owner in owners for n in ("e_score_correction_bias", "expert_bias"))
    return model.config, router, next((bias for bias in biases if bias is not None), None)


def _lone_router(family: str, dtype: torch.dtype) -> tuple[Any, Any, None]:
    config: Any
    if family == "granitemoe":
        config = transformers.GraniteMoeConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=3)
        router: nn.Module = GraniteMoeTopKRouter(config)
    else:
        config = transformers.Llama4TextConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=1)
        router = Llama4Router(config)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return config, router.to(dtype), None


def by_expert(routing: Routing, num_experts: int) -> Tensor:
    """The weight of every expert for every token, [T, E + 1]; the last one is for choices that were dropped."""
    empty = torch.zeros(routing.weights.shape[0], num_experts + 1)
    return empty.scatter_add(1, routing.experts.long(), routing.weights.float())


def assert_same_routing(found: Routing, wanted: Routing, num_experts: int) -> None:
    """The same sets of experts with the same weights, in whatever order."""
    assert torch.equal(found.experts.long().sort(dim=1).values, wanted.experts.long().sort(dim=1).values)
    difference = by_expert(found, num_experts) - by_expert(wanted, num_experts)
    assert difference.abs().max() <= 1e-6


@dataclass(frozen=True)
class TiedLogits:
    """Logits of some tokens, in which experts repeat others."""

    tokens: int
    spread: float
    seed: int
    copies: Sequence[int]  # expert e repeats expert copies[e % len(copies)] % (e + 1) of its logits and biases

    def apply(self, router: FamilyRouter) -> Tensor:
        """The logits [T, E] in the dtype that the router's linear layer gives; changes the router's biases.

        What is not copied is random: sums of scores and biases that only nearly tie would be rounding's to decide.
        """
        size = router.spec.num_experts
        generator = torch.Generator().manual_seed(self.seed)
        source = [self.copies[expert % len(self.copies)] % (expert + 1) for expert in range(size)]
        logits = (torch.randn(self.tokens, size, generator=generator) * self.spread)[:, source]
        if router.correction_bias is not None:
            router.correction_bias.copy_((torch.randn(size, generator=generator) * 0.2)[source])
        return logits if router.spec.float32_logits else logits.to(router.weight.dtype)


def tied_logits() -> st.SearchStrategy[TiedLogits]:
    """Any of them."""
    copies = st.lists(st.integers(0, 63), min_size=1, max_size=16)
    return st.builds(TiedLogits, st.integers(1, 6), st.sampled_from([0.1, 1.0, 4.0]), st.integers(0, 9999), copies)


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
