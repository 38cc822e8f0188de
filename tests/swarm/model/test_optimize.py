"""`optimize`: every family computes what it computed, by our kernels, and can be given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.families import PLAIN, build_model
from torch import Tensor, nn

from moehive.kernels.cpu.packed import can_pack
from moehive.kernels.expert_ffn import ACTIVATIONS, FfnSpec
from moehive.protocol.errors import UnsupportedModel
from moehive.swarm import open_local, optimize
from moehive.swarm.model import optimize as module
from moehive.swarm.model.mathematics import ffn_of
from moehive.swarm.model.seats import experts_modules

needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN has no bf16 products on this machine")


@torch.no_grad()
def logits(model: Any, prompt: Tensor) -> Tensor:
    found: Tensor = model(input_ids=prompt).logits
    return found


def tokens(model: Any, prompt: Tensor) -> Tensor:
    mask = torch.ones_like(prompt)
    found: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return found


def eager(family: str, dtype: str = "float32") -> Any:
    model = build_model(family, dtype)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_gives_the_same_logits_and_tokens(family: str, prompt: Tensor) -> None:
    model = eager(family)
    wanted, text = logits(model, prompt), tokens(model, prompt)
    with optimize(model):
        assert model.config._experts_implementation == module.NAME
        found = logits(model, prompt)
        assert torch.equal(tokens(model, prompt), text)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert model.config._experts_implementation == "eager"
    assert torch.equal(logits(model, prompt), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_it_is_our_kernels_that_run(family: str, prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eager(family)
    optimized = optimize(model)
    calls = []
    monkeypatch.setattr(
        module, "run_experts", lambda hidden, *_: calls.append(hidden.shape) or torch.zeros_like(hidden)
    )
    logits(model, prompt)
    assert calls == [(prompt.numel(), 64)] * len(experts_modules(model))
    optimized.restore()
    logits(model, prompt)
    assert len(calls) == len(experts_modules(model))


@torch.no_grad()
def layer_error(model: Any, weights: dict[str, Tensor] | None = None) -> float:
    """Largest difference between the first experts module and its own eager code in float64."""
    name, experts = next((n, m) for n, m in model.named_modules() if m is experts_modules(model)[0])
    own = {k.removeprefix(f"{name}."): v.double() for k, v in (weights or model.state_dict()).items() if name in k}
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(9, experts.num_experts, generator=generator).topk(2).indices
    hidden, scores = torch.randn(9, 128, generator=generator).bfloat16(), torch.rand(9, 2, generator=generator)
    exact = copy.copy(experts)
    exact._parameters = {key: nn.Parameter(value) for key, value in own.items()}
    wanted = type(experts).forward.__wrapped__(exact, hidden.double(), index, scores.double())
    return float((experts(hidden, index, scores) - wanted).abs().max())


@needs_packing
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packed_weights_compute_the_same_and_come_back(family: str, prompt: Tensor) -> None:
    model = build_model(family, "bfloat16", hidden_size=128, intermediate_size=96)  # large enough to be packed
    model.set_experts_implementation("eager")
    before, wanted = copy.deepcopy(model.state_dict()), logits(model, prompt)
    errors = [layer_error(model)]
    optimized = optimize(model, pack=True)
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    errors.append(layer_error(model, before))
    assert errors[1] <= 1.5 * errors[0]
    assert logits(model, prompt).isfinite().all()
    with pytest.raises(RuntimeError, match="restore it before saving"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(input_ids=prompt)
    optimized.restore()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, prompt), wanted)


def test_packing_is_for_bf16_alone() -> None:
    model = eager("mixtral")
    with pytest.raises(UnsupportedModel, match=r"oneDNN has no bf16|packing is for experts in bf16"):
        optimize(model, pack=True)
    assert model.config._experts_implementation == "eager"
    with optimize(model):
        pass  # nothing was left behind


def test_gradients_are_those_of_eager(prompt: Tensor) -> None:
    gradients = []
    for optimized in (False, True):
        model = eager("mixtral")
        if optimized:
            optimize(model)
        model(input_ids=prompt).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_use_of_experts_is_counted(prompt: Tensor) -> None:
    model = eager("qwen3_moe")
    optimized = optimize(model)
    logits(model, prompt)
    logits(model, prompt[:1, :1])
    statistics = optimized.statistics()
    assert list(statistics) == [0, 1, 2]
    assert {sum(layer.counts) for layer in statistics.values()} == {4 * (prompt.numel() + 1)}


def test_a_model_that_was_converted_meanwhile_is_computed_as_it_is_now(prompt: Tensor) -> None:
    model, twin = eager("mixtral"), eager("mixtral")
    optimize(model)
    logits(model, prompt)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        found, wanted = logits(model, prompt), logits(twin.to(dtype), prompt)
        assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for experts in (*experts_modules(model).values(), *experts_modules(twin).values()):
            experts.down_proj.mul_(2.0)
    torch.testing.assert_close(logits(model, prompt), logits(twin, prompt), rtol=1e-5, atol=1e-5)


def test_models_that_cannot_be_optimised_are_left_alone(converted: Any, prompt: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="has no experts of its own"):
        optimize(open_local(converted)[0])
    model = eager("mixtral")
    optimize(model)
    with pytest.raises(UnsupportedModel, match="optimised already"):
        optimize(model)


class Experts(nn.Module):
    """An experts module with a gate to be recognised."""

    is_transposed = False

    def __init__(self, gate: Any, **attributes: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(1, 2, 2))
        self._gate = gate
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up)  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_an_activation_is_recognised_by_its_values(activation: str) -> None:
    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](first) * second

    assert ACTIVATIONS[ffn_of(Experts(gate)).activation] is ACTIVATIONS[activation]


def test_gpt_oss_is_recognised_with_its_numbers() -> None:
    [experts, *_] = experts_modules(build_model("gpt_oss", "float32", swiglu_limit=5.0)).values()
    assert ffn_of(experts) == FfnSpec("clamped-interleaved", transposed=True, alpha=1.702, limit=5.0)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (Experts(lambda x: x.chunk(2, -1)[0].sin()), "a gate of its own"),
        (Experts(lambda x: x.chunk(2, -1)[0], has_gate=False), "have no gate"),
        (Experts(lambda x: x.chunk(2, -1)[0], has_post_expert_norm=True), "normalised after each expert"),
        (Experts(lambda x: x.chunk(2, -1)[0]).to(torch.float8_e4m3fn), "are quantised"),
    ],
)
def test_other_mathematics_is_refused(experts: Experts, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ffn_of(experts)
