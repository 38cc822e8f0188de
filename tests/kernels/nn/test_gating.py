"""The gate: what it chooses, what it drops, how it is disturbed, and its gradients."""

import pytest
import torch
from torch import Tensor

from moehive.kernels.nn import TopKGate
from moehive.kernels.router import GroupScore, RouterSpec, Score, route

HIDDEN = 12
SPECS = {
    "softmax": RouterSpec(6, 2, normalize=True),
    "softmax, raw": RouterSpec(6, 2, scale=1.5),
    "top-k softmax": RouterSpec(6, 3, score=Score.TOP_K_SOFTMAX),
    "sigmoid, bias, groups": RouterSpec(
        6, 2, score=Score.SIGMOID, correction_bias=True, groups=3, top_groups=2, normalize=True, eps=1e-20, scale=2.5
    ),
    "groups by maximum": RouterSpec(6, 2, groups=3, top_groups=2, group_score=GroupScore.MAX),
    "bias, floor": RouterSpec(6, 2, correction_bias=True, normalize=True, floor=1e-6),
    "sparsemixer": RouterSpec(6, 2, score=Score.SPARSEMIXER, nearness=0.5),
}


def tokens(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(count))


def gate(spec: RouterSpec, **settings: float | None) -> TopKGate:
    torch.manual_seed(0)
    made = TopKGate(HIDDEN, spec, **settings)  # type: ignore[arg-type]
    if made.e_score_correction_bias is not None:
        made.e_score_correction_bias.normal_()
    return made


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_of_weights(spec: RouterSpec) -> None:
    made = gate(spec).double()

    def weights(hidden: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(made, {"weight": weight}, (hidden,)).weights
        return found

    inputs = (tokens(5, torch.float64).requires_grad_(), made.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(weights, inputs)


def test_decisions_are_the_routers() -> None:
    spec = SPECS["sigmoid, bias, groups"]
    made, hidden = gate(spec), tokens(9)
    found = made(hidden)
    wanted = route(hidden @ made.weight.T, spec, made.e_score_correction_bias)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.equal(found.chosen, wanted.experts)
    torch.testing.assert_close(found.weights, wanted.weights)


def test_capacities_of_training_and_evaluation() -> None:
    made, hidden = gate(RouterSpec(6, 2), capacity_factor=0.5, eval_capacity_factor=None), tokens(24)
    training = made(hidden)  # 24 * 2 / 6 * 0.5 = 4 choices for each expert
    counts = torch.bincount(training.experts.flatten(), minlength=7)
    assert counts[:6].max() == 4
    assert counts[6] == (training.experts != training.chosen).sum() > 0
    assert (training.weights[training.experts == 6] == 0).all()
    evaluated = made.eval()(hidden)
    assert torch.equal(evaluated.experts, training.chosen)


def test_jitter_disturbs_training_only() -> None:
    made, hidden = gate(RouterSpec(6, 2), jitter=0.3), tokens(8)
    noisy, plain = made(hidden).logits, made.eval()(hidden).logits
    assert torch.equal(plain, hidden @ made.weight.T)
    assert not torch.allclose(noisy, plain)
    bound = 0.3 * hidden.abs() @ made.weight.abs().T
    assert ((noisy - plain).abs() <= bound + 1e-6).all()


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="follows from its capacity_factor"):
        TopKGate(HIDDEN, RouterSpec(6, 1, capacity=3))
    with pytest.raises(ValueError, match=r"jitter 1\.0 is not in"):
        TopKGate(HIDDEN, RouterSpec(6, 1), jitter=1.0)
