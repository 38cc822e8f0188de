"""The families moehive runs: where their configurations keep what a peer must know, and why others are refused.

A family is in the table when transformers decorates its experts with `@use_experts_implementation`, its expert tensors
follow the two patterns of `names`, and a test converts a tiny checkpoint of it. Nothing is guessed for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moehive.protocol.errors import CheckpointError, UnsupportedModel
from moehive.protocol.manifest import ExpertFfn, Gate

_GPT_OSS_ALPHA = 1.702  # transformers' defaults; the hub's config.json names the limit only
_GPT_OSS_LIMIT = 7.0


@dataclass(frozen=True, slots=True)
class Family:
    """Where one model_type's config.json keeps the facts. Of several keys the first present one counts."""

    architecture: str  # transformers' native class
    experts: tuple[str, ...] = ("n_routed_experts", "num_local_experts", "num_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    intermediate: str = "moe_intermediate_size"
    gate: Gate = Gate.CONCATENATED
    native_type: str | None = None  # model_type to write, where the source's needs remote code


_MIXTRAL_LIKE: dict[str, Any] = {"experts": ("num_local_experts",), "intermediate": "intermediate_size"}
_OLMOE_LIKE: dict[str, Any] = {"experts": ("num_experts",), "intermediate": "intermediate_size"}

FAMILIES: Mapping[str, Family] = {
    # parity-tested against transformers
    "deepseek_v2": Family("DeepseekV2ForCausalLM"),
    "deepseek_v3": Family("DeepseekV3ForCausalLM"),
    "glm4_moe": Family("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM"),
    "gpt_oss": Family("GptOssForCausalLM", gate=Gate.CLAMPED_INTERLEAVED, **_MIXTRAL_LIKE),
    "kimi_k2": Family("DeepseekV3ForCausalLM", native_type="deepseek_v3"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", **_MIXTRAL_LIKE),
    "mixtral": Family("MixtralForCausalLM", **_MIXTRAL_LIKE),
    "olmoe": Family("OlmoeForCausalLM", **_OLMOE_LIKE),
    "phimoe": Family("PhimoeForCausalLM", **_MIXTRAL_LIKE),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_next": Family("Qwen3NextForCausalLM"),
    # converted and checked tensor by tensor
    "afmoe": Family("AfmoeForCausalLM"),
    "deepseek_v32": Family("DeepseekV32ForCausalLM"),
    "dots1": Family("Dots1ForCausalLM"),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", experts=("moe_num_experts",), top_k=("moe_k",)),
    "exaone_moe": Family("ExaoneMoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoForCausalLM", **_OLMOE_LIKE),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM"),
    "hy_v3": Family("HYV3ForCausalLM"),
    "jamba": Family("JambaForCausalLM", **_OLMOE_LIKE),
    "mellum": Family("MellumForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM"),
    "minimax": Family("MiniMaxForCausalLM", **_MIXTRAL_LIKE),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM"),
    "solar_open": Family("SolarOpenForCausalLM"),
}

_OUTSIDE = "transformers gives no hook into its experts (they are not decorated with @use_experts_implementation)"
_OWN_GATE = "its experts have a gate of their own that moehive does not compute yet"
_MULTIMODAL = "it is a multimodal wrapper, and moehive runs text models only"

REFUSED: Mapping[str, str] = {
    "aria": _MULTIMODAL,
    "beam": _OWN_GATE,
    "dbrx": _OUTSIDE,
    "deepseek_v4": _OWN_GATE,
    "glm4v_moe": _MULTIMODAL,
    "granitemoe": "its experts are named input_linear and output_linear, which the conversion rules do not cover",
    "jetmoe": _OUTSIDE,
    "kimi_k25": _MULTIMODAL,
    "llama4": _MULTIMODAL,
    "llama4_text": "its experts see pre-multiplied inputs of every token, and transformers gives no hook into them",
    "longcat_flash": _OUTSIDE,
    "nemotron_h": "its experts have no gate",
    "nllb_moe": _OUTSIDE,
    "qwen3_omni_moe": _MULTIMODAL,
    "qwen3_vl_moe": _MULTIMODAL,
    "step3p7": _OUTSIDE,
    "switch_transformers": _OUTSIDE,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnsupportedModel, which says which one it is and why not."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type: this is not a transformers checkpoint")
    family = FAMILIES.get(model_type)
    if family is None:
        reason = REFUSED.get(model_type, f"moehive knows: {', '.join(sorted(FAMILIES))}")
        raise UnsupportedModel(f"model_type {model_type!r} is not supported: {reason}")
    for architecture in config.get("architectures") or ():
        if not str(architecture).endswith("ForCausalLM"):
            raise UnsupportedModel(f"{architecture} is not a language model that generates text (…ForCausalLM)")
    return family


def integer(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that config.json has, a positive integer. Raises CheckpointError."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise CheckpointError(f"config.json: {key} is {value!r}, a positive integer is expected")
        return value
    raise CheckpointError(f"config.json has no {' or '.join(keys)}")


def ffn_of(family: Family, config: Mapping[str, Any]) -> ExpertFfn:
    """The mathematics of one expert of this family. Raises CheckpointError."""
    activation = config.get("hidden_act", "silu")  # every family here has this default
    if not isinstance(activation, str):
        raise CheckpointError(f"config.json: hidden_act is {activation!r}, a name is expected")
    if family.gate is Gate.CONCATENATED:
        return ExpertFfn(gate=family.gate, activation=activation)
    return ExpertFfn(
        gate=family.gate,
        activation=activation,
        transposed=True,
        bias=True,
        alpha=_number(config, "swiglu_alpha", _GPT_OSS_ALPHA),
        limit=_number(config, "swiglu_limit", _GPT_OSS_LIMIT),
    )


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float):
        raise CheckpointError(f"config.json: {key} is {value!r}, a number is expected")
    return float(value)
