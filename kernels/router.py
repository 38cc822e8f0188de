"""From router logits to the experts of each token and their weights, as each model family defines it.

Owns the mathematics in torch: exact, differentiable in the weights, the reference that the Triton kernel is held to.
What differs between families stands in `RouterSpec`; `kernels/router_families.py` reads it from a configuration.
Equal scores go to the lowest expert id (torch.topk, which transformers uses, leaves open which). NaN is the greatest
score, as it is for torch.topk: an expert whose logit is NaN is chosen, and its weight, NaN, shows in the output.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .capacity import drop_late


class Score(enum.Enum):
    """What makes weights of logits."""

    SOFTMAX = "softmax"  # over all experts (Mixtral, Qwen)
    TOP_K_SOFTMAX = "top-k-softmax"  # over the logits of the chosen experts (GPT-OSS, Granite)
    SIGMOID = "sigmoid"  # each expert by itself (DeepSeek-V3, MiniMax-M2, Llama-4)
    SPARSEMIXER = "sparsemixer"  # two rounds of argmax, softmax over what comes near (Phi-MoE; arXiv 2409.12136)


class GroupScore(enum.Enum):
    """What a group of experts is worth when only the best groups may be chosen from."""

    MAX = "max"  # DeepSeek-V2
    TOP_2_SUM = "top-2-sum"  # DeepSeek-V3


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How the routers of one model choose `top_k` of `num_experts` experts.

    score: see `Score`.
    correction_bias: a bias per expert is added to the scores for the choice, not for the weights (arXiv 2408.15664).
    groups, top_groups, group_score: only the experts of the best `top_groups` of `groups` equal groups may be chosen.
    normalize, eps, floor: weights are divided by max(their sum, floor) + eps.
    scale: then multiplied.
    nearness: of SPARSEMIXER: an expert counts when (best - its logit) / max(|its logit|, best) <= 2 * nearness.
    capacity: choices that an expert takes per sequence; later ones are dropped (Switch Transformers). None: no limit.
    float32_logits: the router's linear layer computes in fp32 whatever the model's dtype is.
    weights_in_hidden_dtype: weights are rounded to the dtype of the hidden states; they stay fp32 otherwise.

    Raises ValueError for numbers that do not go together.
    """

    num_experts: int
    top_k: int
    score: Score = Score.SOFTMAX
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.TOP_2_SUM
    normalize: bool = False
    eps: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    nearness: float = 0.01
    capacity: int | None = None
    float32_logits: bool = False
    weights_in_hidden_dtype: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} of {self.num_experts} experts")
        if self.score is Score.SPARSEMIXER and (self.top_k != 2 or self.correction_bias or self.is_grouped):
            raise ValueError("the sparsemixer chooses two experts, without bias and groups")
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity {self.capacity} is less than one token")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.num_experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"the best {self.top_groups} of {self.groups} groups of {self.num_experts} experts")
        if self.top_k > self.top_groups * self.group_size:
            raise ValueError(f"top_k {self.top_k} of {self.top_groups} groups with {self.group_size} experts each")
        if self.is_grouped and self.group_score is GroupScore.TOP_2_SUM and self.group_size < 2:
            raise ValueError("groups of one expert have no second best")

    @property
    def group_size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.groups

    @property
    def is_grouped(self) -> bool:
        """Whether groups restrict the choice."""
        return self.top_groups < self.groups

    @property
    def chooses_by_logits(self) -> bool:
        """Whether the order of the logits decides. Scores rise with logits, so it does unless scores are added to
        something; and logits have no ties that rounding made."""
        sums_scores = self.is_grouped and self.group_score is GroupScore.TOP_2_SUM
        return not self.correction_bias and not (sums_scores and self.score is not Score.TOP_K_SOFTMAX)


class Routing(NamedTuple):
    """The choices of T tokens. A choice that was dropped has expert `num_experts` and weight 0."""

    weights: Tensor  # [T, K] fp32, or the hidden states' dtype where the spec says so
    experts: Tensor  # [T, K] int64, from the Triton kernel int32; in falling order of what decided the choice


def router_logits(hidden: Tensor, weight: Tensor, spec: RouterSpec, bias: Tensor | None = None) -> Tensor:
    """The router's linear layer: hidden [T, H], weight [E, H], bias [E] -> [T, E], in the dtype that the spec asks."""
    if not spec.float32_logits:
        return F.linear(hidden, weight, bias)
    hidden, weight = hidden.to(_exact(hidden)), weight.to(_exact(weight))
    if not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):  # which would make it narrow again
        return F.linear(hidden, weight, bias)


def route(
    logits: Tensor,
    spec: RouterSpec,
    correction_bias: Tensor | None = None,
    *,
    hidden_dtype: torch.dtype | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """Choose experts for logits [T, E]: the Triton kernel on a GPU without gradients, torch everywhere else.

    `correction_bias` is [E]. `hidden_dtype` is the dtype that weights are rounded to where the spec asks for it; the
    logits' own by default. `sequence_length` cuts the T tokens into the sequences that each have their own capacity;
    by default they are one. Raises ValueError for shapes or a bias that do not fit the spec.
    """
    check_router_input(logits, spec, correction_bias, sequence_length)
    if logits.is_cuda and not (torch.is_grad_enabled() and logits.requires_grad):
        from .gpu.route import route_on_gpu

        return route_on_gpu(logits, spec, correction_bias, hidden_dtype, sequence_length)
    routing = _sparsemixer(logits, spec) if spec.score is Score.SPARSEMIXER else _top_k(logits, spec, correction_bias)
    weights = routing.weights.to((hidden_dtype or logits.dtype) if spec.weights_in_hidden_dtype else _exact(logits))
    if spec.capacity is None:
        return Routing(weights, routing.experts)
    return Routing(*drop_late(weights, routing.experts, spec.capacity, spec.num_experts, sequence_length))


def check_router_input(
    logits: Tensor, spec: RouterSpec, correction_bias: Tensor | None, sequence_length: int | None
) -> None:
    """Raises ValueError where `route`'s arguments do not fit the spec."""
    if logits.ndim != 2 or logits.shape[1] != spec.num_experts:
        raise ValueError(f"logits {tuple(logits.shape)} are not [T, {spec.num_experts}]")
    if spec.correction_bias != (correction_bias is not None):
        raise ValueError(f"the router {'needs a' if spec.correction_bias else 'has no'} correction bias")
    if correction_bias is not None and tuple(correction_bias.shape) != (spec.num_experts,):
        raise ValueError(f"correction bias {tuple(correction_bias.shape)} is not [{spec.num_experts}]")
    if sequence_length is not None and (sequence_length < 1 or logits.shape[0] % sequence_length):
        raise ValueError(f"{logits.shape[0]} tokens are not sequences of {sequence_length}")


def _exact(tensor: Tensor) -> torch.dtype:
    """fp32; fp64 for tests."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _top_k(logits: Tensor, spec: RouterSpec, correction_bias: Tensor | None) -> Routing:
    logits = logits.to(_exact(logits))  # [T, E]
    scores = _scores(logits, spec.score)  # [T, E]
    key = (logits if spec.chooses_by_logits else scores).detach()  # [T, E]
    if correction_bias is not None:
        key = key + correction_bias
    if spec.is_grouped:
        key = key.masked_fill(~_in_best_groups(key, spec), float("-inf"))
    experts = best(key, spec.top_k)  # [T, K]
    weights = scores.gather(1, experts)  # [T, K]
    if spec.score is Score.TOP_K_SOFTMAX:
        weights = weights.softmax(dim=-1)
    if spec.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True).clamp(min=spec.floor) + spec.eps)
    return Routing(weights * spec.scale, experts)


def _scores(logits: Tensor, score: Score) -> Tensor:
    if score is Score.SOFTMAX:
        return logits.softmax(dim=-1)
    return logits.sigmoid() if score is Score.SIGMOID else logits


def best(key: Tensor, count: int) -> Tensor:
    """The indices [..., count] of the greatest elements of the last dimension, greatest first, ties to the lowest."""
    return key.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _in_best_groups(key: Tensor, spec: RouterSpec) -> Tensor:
    """Which experts may be chosen: [T, E] bool. transformers, `DeepseekV3TopkRouter` and `DeepseekV2TopkRouter`."""
    grouped = key.view(-1, spec.groups, spec.group_size)  # [T, G, E / G]
    worth = grouped.topk(2 if spec.group_score is GroupScore.TOP_2_SUM else 1, dim=-1).values.sum(dim=-1)  # [T, G]
    chosen = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best(worth, spec.top_groups), True)  # [T, G]
    return chosen.repeat_interleave(spec.group_size, dim=1)


def _sparsemixer(logits: Tensor, spec: RouterSpec) -> Routing:
    """transformers, `sparsemixer` in evaluation: what is near is found in the logits' dtype, with its roundings."""
    experts = best(logits.detach(), spec.top_k)  # [T, K]
    left, weights = logits, []
    for chosen in torch.split(experts, 1, dim=1):
        top = logits.detach().gather(1, chosen)  # [T, 1]
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * spec.nearness  # [T, E]
        near = left.masked_fill(far, float("-inf")).to(_exact(logits))  # [T, E]
        weights.append(near.softmax(dim=-1).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return Routing(torch.cat(weights, dim=1), experts)
