"""The network: its architecture, its learning form, what it minimises, and how it is saved and read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moehive.kernels.nn import (
    Balance,
    ExpertChoiceLayer,
    LayerReport,
    LossFreeMoELayer,
    MoEConfig,
    MoELayer,
    build_layer,
)

from .text import CONTEXT_LENGTH, END_OF_TEXT_ID, VOCABULARY_SIZE

BALANCE_COEFFICIENT = 0.02  # of a loss that is 1 at even load; transformers' loss is top_k times as large
INITIALIZER_RANGE = 0.06  # near 1 / sqrt(hidden size); with the usual 0.02 a model this small learns far more slowly


@dataclass(frozen=True)
class Shape:
    """What may differ from the bundled model, for studies on larger ones."""

    layers: int = 6
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 160


def model_config(shape: Shape = Shape()) -> Qwen3MoeConfig:
    """Return the architecture: unless told otherwise 6 layers of 8 experts, of which every token uses 2."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=320,  # of a dense feed-forward layer, which this model has none of
        moe_intermediate_size=shape.expert_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=shape.experts,
        initializer_range=INITIALIZER_RANGE,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT / 2,  # in transformers' units
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def layer_config(config: Qwen3MoeConfig) -> MoEConfig:
    """Return the learning form of a sparse block of this network, balanced by an auxiliary loss."""
    return MoEConfig(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        Balance.AUXILIARY,
        balance_coefficient=BALANCE_COEFFICIENT,
    )


def generation_config() -> GenerationConfig:
    """Return the recommended sampling settings.

    There is no repetition penalty: it would also change greedy decoding, which then would no longer
    be the plain argmax of the logits.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=40,
        max_new_tokens=200,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def count_parameters(model: Qwen3MoeForCausalLM) -> tuple[int, int]:
    """Return how many parameters there are, and how many of them one token uses."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return total, total - idle


class Trainee:
    """A Qwen3-MoE whose sparse blocks are `moehive.kernels.nn` layers while it learns.

    The layers' parameters have the names and start with the values of the blocks that they replace. A top-k layer
    without correction bias computes what the block computes, so `export` is the same network for transformers.

    tokens: of all training steps, once for each layer. dropped: what the layers reported as dropped.
    """

    def __init__(self, model: Qwen3MoeForCausalLM, layer: MoEConfig) -> None:
        self.model = model
        self.layers: list[MoELayer | ExpertChoiceLayer] = []
        self.tokens, self.dropped = 0, 0
        self._reports: list[LayerReport] = []
        for decoder in model.model.layers:
            learning = build_layer(layer)
            missing, unknown = learning.load_state_dict(decoder.mlp.state_dict(), strict=False)
            assert not unknown, unknown
            assert set(missing) <= {"gate.e_score_correction_bias"}, missing
            learning.register_forward_hook(self._keep_report)
            decoder.mlp = learning
            self.layers.append(learning)

    def _keep_report(self, _layer: nn.Module, _inputs: object, result: tuple[Tensor, LayerReport]) -> Tensor:
        """What a decoder layer expects of its block is the output alone."""
        self._reports.append(result[1])
        return result[0]

    def logits(self, inputs: Tensor) -> tuple[Tensor, list[LayerReport]]:
        """Token ids [B, T] -> logits [B, T, V] and what each layer reports."""
        self._reports.clear()
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return logits, list(self._reports)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy plus the mean of the layers' own losses, for `inputs` and `targets`, both [B, T].

        Every layer has to be balanced by itself. The loss that transformers computes adds the layers up first, so that
        an expert starved in one layer and overloaded in another looks balanced.
        """
        logits, reports = self.logits(inputs)
        self.tokens += inputs.numel() * len(self.layers)
        self.dropped += sum(int(report.dropped) for report in reports)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return cross_entropy + torch.stack([report.loss for report in reports]).mean()

    def after_step(self) -> None:
        """What layers learn from their load rather than from a gradient."""
        for layer in self.layers:
            if isinstance(layer, LossFreeMoELayer):
                layer.update_bias()

    def export(self) -> Qwen3MoeForCausalLM:
        """A plain transformers model with these weights."""
        plain = Qwen3MoeForCausalLM(self.model.config)
        plain.load_state_dict(self.model.state_dict())
        return plain


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer into `folder`."""
    model.to(torch.bfloat16)
    model.generation_config = generation_config()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """Read a saved folder back the way its users do, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(Qwen3MoeForCausalLM, model), cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))
