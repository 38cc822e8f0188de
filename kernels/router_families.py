"""What the configuration of a model says about its routers. Knows attribute names, not transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from .router import GroupScore, RouterSpec, Score


def router_spec(config: Any) -> RouterSpec:
    """The routers of a model with this transformers configuration (any object with its attributes).

    Composite configurations are asked for their `text_config`. Raises ValueError for a family that is not known.
    """
    config = getattr(config, "text_config", None) or config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"no router is known for model type {config.model_type!r}, only for {sorted(_FAMILIES)}")
    return family(config)


def _num_experts(config: Any) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    raise ValueError(f"the configuration of {config.model_type!r} does not say how many experts there are")


def _sizes(config: Any) -> tuple[int, int]:
    return _num_experts(config), int(config.num_experts_per_tok)


def _mixtral(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), normalize=True)


def _qwen(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), normalize=bool(config.norm_topk_prob), weights_in_hidden_dtype=True)


def _qwen_always_normalized(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), normalize=True, weights_in_hidden_dtype=True)


def _jamba(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), weights_in_hidden_dtype=True)


def _gpt_oss(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), score=Score.TOP_K_SOFTMAX, weights_in_hidden_dtype=True)


def _phimoe(config: Any) -> RouterSpec:
    return RouterSpec(
        *_sizes(config),
        score=Score.SPARSEMIXER,
        nearness=float(config.router_jitter_noise),
        weights_in_hidden_dtype=True,
    )


def _deepseek_v3(config: Any) -> RouterSpec:
    return RouterSpec(
        *_sizes(config),
        score=Score.SIGMOID,
        correction_bias=True,
        groups=int(config.n_group),
        top_groups=int(config.topk_group),
        normalize=bool(config.norm_topk_prob),
        eps=1e-20,
        scale=float(config.routed_scaling_factor),
        float32_logits=True,
    )


def _deepseek_v2(config: Any) -> RouterSpec:
    """Experts outside the best groups cannot be chosen. transformers gives them a score of 0 instead, which differs
    only where the scores of chosen groups underflow to 0, too."""
    grouped = config.topk_method == "group_limited_greedy"
    return RouterSpec(
        *_sizes(config),
        groups=int(config.n_group) if grouped else 1,
        top_groups=int(config.topk_group) if grouped else 1,
        group_score=GroupScore.MAX,
        scale=float(config.routed_scaling_factor),
        float32_logits=True,
    )


def _minimax_m2(config: Any) -> RouterSpec:
    return RouterSpec(*_sizes(config), score=Score.SIGMOID, correction_bias=True, normalize=True)


def _afmoe(config: Any) -> RouterSpec:
    return RouterSpec(
        *_sizes(config),
        score=Score.SIGMOID,
        correction_bias=True,
        normalize=True,
        eps=1e-20,
        scale=float(config.route_scale),
    )


def _hy_v3(config: Any) -> RouterSpec:
    return RouterSpec(
        *_sizes(config),
        score=Score.SIGMOID,
        correction_bias=True,
        normalize=True,
        eps=1e-20,
        scale=float(config.router_scaling_factor),
        float32_logits=True,
    )


def _ernie(config: Any) -> RouterSpec:
    return RouterSpec(
        *_sizes(config),
        correction_bias=True,
        normalize=True,
        floor=float(config.moe_norm_min),
        float32_logits=True,
        weights_in_hidden_dtype=True,
    )


def _llama4(config: Any) -> RouterSpec:
    """The weight multiplies the expert's input, not its output."""
    return RouterSpec(*_sizes(config), score=Score.SIGMOID, weights_in_hidden_dtype=True)


def _switch(config: Any) -> RouterSpec:
    return RouterSpec(
        int(config.num_experts),
        1,
        capacity=int(config.expert_capacity),
        float32_logits=config.router_dtype == "float32",
        weights_in_hidden_dtype=True,
    )


# model_type -> its router, as of transformers 5.23
_FAMILIES: Final[Mapping[str, Callable[[Any], RouterSpec]]] = {
    **dict.fromkeys(("mixtral", "minimax"), _mixtral),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "mellum"), _qwen),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), _qwen_always_normalized),
    **dict.fromkeys(("gpt_oss", "granitemoe"), _gpt_oss),
    **dict.fromkeys(
        ("deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "dots1", "exaone_moe",
         "mimo_v2_flash", "solar_open"),
        _deepseek_v3,
    ),
    "jamba": _jamba,
    "phimoe": _phimoe,
    "deepseek_v2": _deepseek_v2,
    "minimax_m2": _minimax_m2,
    "afmoe": _afmoe,
    "hy_v3": _hy_v3,
    "ernie4_5_moe": _ernie,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "switch_transformers": _switch,
}  # fmt: skip

MODEL_TYPES: Final = frozenset(_FAMILIES)
"""The families that are known, as `model_type` names them."""
