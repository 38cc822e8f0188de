"""One layer of experts against transformers' own modules, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moehive.kernels.combine import add_token_row, combine_rows, weighted_sum
from moehive.kernels.expert_ffn import ACTIVATIONS, ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import Assignment, group_by_expert, order_of_token

HIDDEN, INNER, EXPERTS, TOP_K = 64, 48, 8, 3
CLAMPED = FfnSpec(gate="clamped-interleaved", transposed=True, alpha=1.702, limit=7.0)


def eager_module(spec: FfnSpec, dtype: torch.dtype) -> Any:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    if spec.transposed:
        module: Any = GptOssExperts(GptOssConfig(**sizes, experts_implementation="eager"))
    else:
        module = MixtralExperts(MixtralConfig(**sizes, hidden_act=spec.activation, experts_implementation="eager"))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4  # wide enough to reach the clamp
    return module.to(dtype).requires_grad_(False)


def weights_of(module: Any, expert: int) -> ExpertWeights:
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    return ExpertWeights(*(getattr(module, name)[expert] if hasattr(module, name) else None for name in names))


def routing(tokens: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    return hidden, index, scores.to(weight_dtype)


def outputs(module: Any, spec: FfnSpec, hidden: Tensor, index: Tensor) -> list[tuple[Assignment, Tensor]]:
    groups = group_by_expert(index, EXPERTS)
    return [(group, expert_ffn(hidden[group.token], weights_of(module, group.expert), spec)) for group in groups]


@pytest.mark.parametrize("tokens", [1, 2, 23])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("spec", [FfnSpec(), FfnSpec(activation="gelu"), CLAMPED], ids=["silu", "gelu", "clamped"])
def test_a_layer_equals_eager(spec: FfnSpec, dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int) -> None:
    module = eager_module(spec, dtype)
    hidden, index, weights = routing(tokens, dtype, weight_dtype)
    wanted = module(hidden, index, weights)
    found = combine_rows(torch.zeros_like(hidden), outputs(module, spec, hidden, index), weights)
    assert torch.equal(found, wanted)
    if tokens == 1:
        found = torch.zeros_like(hidden)
        for expert, position in order_of_token(index, EXPERTS):
            add_token_row(found, expert_ffn(hidden, weights_of(module, expert), spec), position, weights)
        assert torch.equal(found, wanted)


def test_weighted_sum_is_the_same_sum_accumulated_in_fp32() -> None:
    module = eager_module(FfnSpec(), torch.bfloat16)
    hidden, index, weights = routing(23, torch.bfloat16, torch.float32)
    rows = outputs(module, FfnSpec(), hidden, index)
    terms = [(group.token, out, weights[group.token, group.position]) for group, out in rows]
    found = weighted_sum(terms, (23, HIDDEN), torch.bfloat16)
    exact = torch.zeros(23, HIDDEN, dtype=torch.float64)
    for group, out in rows:
        exact.index_add_(0, group.token, out.double() * weights[group.token, group.position, None].double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
    # fewer roundings than eager's: closer to the exact sum than the bf16 additions are
    eager = module(hidden, index, weights)
    assert (found.double() - exact).abs().sum() < (eager.double() - exact).abs().sum()


def test_weighted_sum_leaves_unserved_tokens_at_zero() -> None:
    found = weighted_sum([(torch.tensor([1]), torch.ones(1, 4), torch.tensor([0.5]))], (3, 4), torch.float32)
    assert found.tolist() == [[0.0] * 4, [0.5] * 4, [0.0] * 4]


def test_experts_out_of_order_are_a_bug_of_the_caller() -> None:
    first, second = (Assignment(expert, torch.tensor([0]), torch.tensor([0])) for expert in (1, 0))
    rows = torch.ones(1, 4)
    with pytest.raises(AssertionError, match="expert 0 after expert 1"):
        combine_rows(torch.zeros(1, 4), [(first, rows), (second, rows)], torch.ones(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 257).to(dtype)
    assert torch.equal(ACTIVATIONS[name](x), ACT2FN[name](x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "snake"}, "unknown activation 'snake', not one of"),
        ({"gate": "summed"}, "unknown gate 'summed'"),
        ({"gate": "clamped-interleaved", "alpha": 1.7}, "needs alpha and limit"),
    ],
)
def test_unknown_mathematics_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FfnSpec(**arguments)


def test_size_counts_every_weight() -> None:
    module = eager_module(CLAMPED, torch.bfloat16)
    parameters = HIDDEN * 2 * INNER + INNER * HIDDEN + 2 * INNER + HIDDEN
    assert weights_of(module, 0).nbytes == 2 * parameters
    assert weights_of(module, 0).to(torch.device("cpu")).nbytes == 2 * parameters
