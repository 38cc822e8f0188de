"""The configurations of the tiny checkpoints: small, yet every feature of a family's routing and attention is on."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 320  # 3 special tokens, 256 bytes, and some that the tokenizer never produces

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_SPARSE: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_shared_experts": 1}
_DEEPSEEK: dict[str, Any] = {**_MLA, **_SPARSE, **_ROUTED, "first_k_dense_replace": 1}

# name -> (transformers' configuration class, its arguments on top of COMMON)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("PhimoeConfig", {
        "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "attention_bias": True, "lm_head_bias": True, "sliding_window": 32,
    }),
    "mixtral": ("MixtralConfig", {
        "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 16,
    }),
    "gpt_oss": ("GptOssConfig", {
        "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 8,
        "num_experts_per_tok": 4, "sliding_window": 16,
    }),
    "gpt_oss_mxfp4": ("GptOssConfig", {
        "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 8,
        "num_experts_per_tok": 4, "sliding_window": 16,
    }),
    "qwen3_moe": ("Qwen3MoeConfig", {
        **_SPARSE, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True, "head_dim": 16,
    }),
    "mixtral_gptq": ("MixtralConfig", {
        "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 16,
    }),
    "qwen3_moe_awq": ("Qwen3MoeConfig", {
        **_SPARSE, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True, "head_dim": 16,
    }),
    "qwen3_moe_int4": ("Qwen3MoeConfig", {
        **_SPARSE, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True, "head_dim": 16,
    }),
    "deepseek_v3": ("DeepseekV3Config", {
        **_DEEPSEEK, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0,
    }),
    # Every size is ragged against the 128 block. kv_a_proj_with_mqa has 144 rows under 2 scale rows: transformers 5.23
    # takes the block for 72 rows and is silently wrong, so the reference for this one is its bf16 twin.
    "deepseek_v3_fp8": ("DeepseekV3Config", {
        **_DEEPSEEK, "hidden_size": 160, "intermediate_size": 192, "moe_intermediate_size": 144, "kv_lora_rank": 128,
        "qk_rope_head_dim": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0,
    }),
    "kimi_k2": ("DeepseekV3Config", {
        **_DEEPSEEK, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_mtp_layers": 0,
    }),
    "kimi_k2_int4": ("DeepseekV3Config", {
        **_DEEPSEEK, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "num_mtp_layers": 0,
    }),
    "qwen3_next": ("Qwen3NextConfig", {
        **_SPARSE, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_tok": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }),
    "glm4_moe": ("Glm4MoeConfig", {
        **_SPARSE, **_ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16,
        "use_qk_norm": True,
    }),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**_MLA, **_SPARSE, **_ROUTED, "n_group": 1, "topk_group": 1}),
    "minimax_m2": ("MiniMaxM2Config", {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 4,
        "head_dim": 16,
    }),
    "olmoe": ("OlmoeConfig", {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 4,
    }),
    "deepseek_v2": ("DeepseekV2Config", {
        **_DEEPSEEK, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
    }),
    "qwen2_moe": ("Qwen2MoeConfig", {
        **_SPARSE, "num_hidden_layers": 2, "shared_expert_intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2,
    }),
}  # fmt: skip

_TWO_OF_EIGHT: dict[str, Any] = {**_SPARSE, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
_GROUPED: dict[str, Any] = {**_SPARSE, **_ROUTED, "n_group": 1, "topk_group": 1}

# Families that the converter takes by the same rules, beyond those whose parity is part of the acceptance.
EXTRA_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", {**_TWO_OF_EIGHT, "num_shared_experts": 1, "num_dense_layers": 1}),
    "deepseek_v32": ("DeepseekV32Config", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "dots1": ("Dots1Config", {**_GROUPED, "first_k_dense_replace": 1, "head_dim": 16}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {
        **_SPARSE, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    }),
    "exaone_moe": ("ExaoneMoeConfig", {**_TWO_OF_EIGHT, "num_shared_experts": 1, "sliding_window": 16}),
    "flex_olmo": ("FlexOlmoConfig", {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
    }),
    "glm_moe_dsa": ("GlmMoeDsaConfig", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "hy_v3": ("HYV3Config", _TWO_OF_EIGHT),
    "jamba": ("JambaConfig", {
        "intermediate_size": 32, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    }),
    "mellum": ("MellumConfig", _TWO_OF_EIGHT),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {
        **_SPARSE, "n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    }),
    "minimax": ("MiniMaxConfig", {
        "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 16,
    }),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_hidden_layers": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    }),
    "solar_open": ("SolarOpenConfig", {**_GROUPED, "head_dim": 16}),
}  # fmt: skip
