"""Sensible settings of a Mixture-of-Experts layer from its sizes: `for_moe(...)`. `build_layer` makes the layer."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from moehive.kernels.expert_ffn import ACTIVATIONS
from moehive.kernels.router import RouterSpec, Score

_DENSE_WIDTH = 8 / 3  # of a gated feed-forward network to the hidden size, for the parameters of an ungated one of 4
_WIDTH_STEP = 32  # widths that suit matrix units


class Balance(enum.Enum):
    """What keeps the experts evenly loaded."""

    NONE = "none"
    AUXILIARY = "auxiliary"  # a loss (arXiv 2101.03961)
    LOSS_FREE = "loss-free"  # a bias on the choice, after each step (arXiv 2408.15664)
    SWITCH = "switch"  # one expert per token, a loss, a capacity, jitter (arXiv 2101.03961)
    EXPERT_CHOICE = "expert-choice"  # experts choose tokens (arXiv 2202.09368)


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """One Mixture-of-Experts layer. Raises ValueError for numbers that do not go together.

    hidden_size: H. intermediate_size: I of each expert. num_experts: E.
    top_k: experts of one token; with expert choice, of a token on average.
    balance_coefficient: of the load-balancing loss, which is 1 at even load. z_coefficient: of the router's z-loss.
    bias_update_rate: of the loss-free bias, per optimizer step.
    capacity_factor: while training an expert takes this many times an even share of a call's tokens and drops the rest;
      eval_capacity_factor: the same outside training. None: nothing is dropped.
    jitter: while training the router's inputs are multiplied by uniform noise from [1 - jitter, 1 + jitter].
    activation: of the experts' gate, a name in `moehive.kernels.expert_ffn.ACTIVATIONS`.

    A setting that a scheme has no use for is ignored: expert choice has neither capacity factors nor jitter nor a
    balancing loss, and only the loss-free bias has a rate.

    >>> MoEConfig(64, 96, num_experts=8, top_k=2, balance=Balance.AUXILIARY, balance_coefficient=0.01).router.normalize
    True
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    balance: Balance = Balance.AUXILIARY
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    jitter: float = 0.0
    activation: str = "silu"

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.intermediate_size, self.num_experts, self.top_k) < 1:
            raise ValueError(f"every size must be at least 1: {self}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} of {self.num_experts} experts")
        if self.balance is Balance.SWITCH and self.top_k != 1:
            raise ValueError(f"Switch routing has one expert per token, not {self.top_k}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}, not one of {sorted(ACTIVATIONS)}")
        if min(self.balance_coefficient, self.z_coefficient, self.bias_update_rate) < 0:
            raise ValueError(f"coefficients and rates must not be negative: {self}")

    @property
    def router(self) -> RouterSpec:
        """How tokens choose. The weight of a single expert is not normalised: it would always be 1, and its router
        would learn nothing."""
        normalize = self.top_k > 1
        if self.balance is Balance.LOSS_FREE:
            return RouterSpec(
                self.num_experts, self.top_k, score=Score.SIGMOID, correction_bias=True, normalize=normalize,
                eps=1e-20, float32_logits=True,
            )  # fmt: skip
        return RouterSpec(self.num_experts, self.top_k, normalize=normalize, weights_in_hidden_dtype=True)


def for_moe(
    hidden_size: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    balance: Balance | str = Balance.AUXILIARY,
    intermediate_size: int | None = None,
    activation: str = "silu",
) -> MoEConfig:
    """Settings that suit a layer of this size; change single ones with `dataclasses.replace`.

    top_k: experts of one token; by default 2, and 1 for Switch routing, which has no other.
    intermediate_size: by default such that the `top_k` experts of a token have together the parameters of the dense
      gated feed-forward network of this hidden size (8/3 wide), rounded up to a multiple of 32.
    balance: one of `Balance`, or its value. Coefficients and rates are those of the papers. Where a loss balances,
      there is a small z-loss too (ST-MoE, arXiv 2202.08906); where none does, nothing is added to the model's own loss.

    Raises ValueError for sizes that do not go together and for an unknown balance.

    >>> for_moe(512, 16).intermediate_size, for_moe(512, 16, 4).intermediate_size
    (704, 352)
    >>> from dataclasses import replace
    >>> switch = for_moe(512, 16, balance="switch")
    >>> switch.top_k, switch.capacity_factor, replace(switch, capacity_factor=None).capacity_factor
    (1, 1.25, None)
    """
    balance = Balance(balance)
    switch = balance is Balance.SWITCH
    by_loss = switch or balance is Balance.AUXILIARY
    if top_k is None:
        top_k = 1 if switch else 2
    if intermediate_size is None:
        width = _DENSE_WIDTH * hidden_size / max(top_k, 1)  # MoEConfig refuses 0
        intermediate_size = -(-int(width) // _WIDTH_STEP) * _WIDTH_STEP
    return MoEConfig(
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        balance,
        balance_coefficient=0.01 if by_loss else 0.0,
        z_coefficient=0.001 if by_loss else 0.0,
        bias_update_rate=0.001 if balance is Balance.LOSS_FREE else 0.0,
        capacity_factor=1.25 if switch else None,
        eval_capacity_factor=2.0 if switch else None,
        jitter=0.01 if switch else 0.0,
        activation=activation,
    )
