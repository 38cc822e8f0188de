"""Recording: what a model's routers chose, call by call, without changing what it computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moehive.protocol.errors import TraceError, UnsupportedModel
from moehive.swarm.trace.recording import Recorder

PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1])
    ).eval()


def generate(model: Qwen3MoeForCausalLM) -> list[int]:
    output = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = output[0].tolist()
    return tokens


def test_a_generation_is_recorded_as_the_routers_chose_it(model: Qwen3MoeForCausalLM) -> None:
    chosen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    plain = generate(model)
    hooks = [
        model.model.layers[layer].mlp.gate.register_forward_hook(
            lambda module, inputs, outputs, layer=layer: chosen[layer].append(outputs[2])
        )
        for layer in chosen
    ]
    recorder = Recorder(model, samples=5)
    with recorder.listening(), torch.inference_mode():
        assert generate(model) == plain
        recorder.start_session()
        generate(model)
    for hook in hooks:
        hook.remove()
    generate(model)  # after the context nobody listens
    trace = recorder.trace("tiny")
    assert (trace.model, trace.layers, trace.num_experts, trace.top_k) == ("tiny", (0, 2), 4, 2)
    assert trace.tokens.tolist() == [4, 1, 1] * 2
    assert np.flatnonzero(trace.starts).tolist() == [0, 3]
    for column, layer in enumerate(trace.layers):
        assert np.array_equal(trace.experts[:, column], torch.cat(chosen[layer]).numpy())
    samples = trace.samples
    assert samples is not None
    assert samples.rows.tolist() == [0, 1, 2, 3, 4]
    assert samples.inputs.shape == samples.residuals.shape == (5, 2, 16)
    assert np.square(samples.residuals.astype(np.float32)).mean(-1) == pytest.approx(1, rel=1e-2)
    # What the router gets is what it chooses by.
    logits = samples.inputs[:, 1].astype(np.float32) @ model.model.layers[2].mlp.gate.weight.detach().numpy().T
    assert [set(row) for row in np.argsort(-logits)[:, :2].tolist()] == [
        set(row) for row in trace.experts[:5, 1].tolist()
    ]


def test_nothing_heard_is_no_trace(model: Qwen3MoeForCausalLM) -> None:
    with pytest.raises(TraceError, match="was there none"):
        Recorder(model).trace("tiny")


def test_a_model_without_routed_experts_cannot_be_recorded() -> None:
    with pytest.raises(UnsupportedModel, match="Linear has no routed experts"):
        Recorder(nn.Linear(2, 2))
