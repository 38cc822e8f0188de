"""Attention of experts, against every head for every token with the others' weights at zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moehive.kernels.nn import SparseExpertAttention

HIDDEN, EXPERTS, TOP_K = 12, 5, 2


def attention(dtype: torch.dtype = torch.float64, **settings: object) -> SparseExpertAttention:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"num_experts": EXPERTS, "top_k": TOP_K, "heads": 2, "head_dim": 4}
    return SparseExpertAttention(HIDDEN, **sizes | {"z_coefficient": 0.01} | settings).to(dtype)  # type: ignore[arg-type]


def hidden_states(sequences: int = 2, length: int = 7) -> Tensor:
    return torch.randn(sequences, length, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rotary(length: int, size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] * 10.0 ** -torch.arange(0, size, 2)[None, :]
    angle = torch.cat((angle, angle), dim=-1).double()  # [S, D]
    return angle.cos(), angle.sin()


def turned(x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    if angles is None:
        return x
    half = x.shape[-1] // 2
    return x * angles[0] + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * angles[1]


def dense(layer: SparseExpertAttention, hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """All heads of all experts for all tokens, then the gate's weights: [B, S, H]."""
    gating = layer.gate(hidden.flatten(0, 1))
    share = torch.zeros(hidden[..., 0].numel(), EXPERTS + 1, dtype=hidden.dtype)
    share = share.scatter_add(1, gating.experts, gating.weights)[:, :EXPERTS].view(*hidden.shape[:2], EXPERTS)

    def heads(x: Tensor) -> Tensor:
        return x.view(*hidden.shape[:2], layer.heads, layer.head_dim).transpose(1, 2)  # [B, h, S, D]

    key, value = (heads(part) for part in layer.key_value(hidden).chunk(2, dim=-1))
    output = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        query = turned(heads(F.linear(hidden, layer.query[expert])), angles)
        attended = F.scaled_dot_product_attention(query, turned(key, angles), value, is_causal=layer.causal)
        row = F.linear(attended.transpose(1, 2).flatten(2), layer.output[expert])
        output = output + share[..., expert, None] * row
    return output


@pytest.mark.parametrize("with_rotary", [False, True])
@pytest.mark.parametrize("settings", [{}, {"causal": False}, {"capacity_factor": 0.5}, {"head_dim": None, "heads": 1}])
def test_equal_to_dense_attention(settings: dict[str, object], with_rotary: bool) -> None:
    layer, hidden = attention(**settings), hidden_states()
    angles = rotary(7, layer.head_dim) if with_rotary else None
    output, report = layer(hidden, angles)
    torch.testing.assert_close(output, dense(layer, hidden, angles))
    assert int(report.counts.sum()) == 2 * 7 * TOP_K
    assert (int(report.dropped) > 0) == ("capacity_factor" in settings)


def test_a_causal_token_does_not_see_what_comes_later() -> None:
    layer, hidden = attention(), hidden_states()
    changed = hidden.clone()
    changed[:, 4:] += 1.0
    before, after = layer(hidden)[0], layer(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 0.1


SETTINGS = {
    "causal": {},
    "full": {"causal": False},
    "capacity": {"capacity_factor": 0.5},
    "one expert": {"num_experts": 3, "top_k": 1},
    "rotary": {"with_rotary": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients(settings: dict[str, object]) -> None:
    """Output and loss, to the hidden states and every parameter."""
    settings = dict(settings)
    angles = rotary(4, 4) if settings.pop("with_rotary", False) else None
    layer = attention(**settings)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        output, report = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (hidden, angles))
        return output, report.loss

    leaves = (hidden_states(2, 4), *(value.detach() for value in values))
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves), fast_mode=True)


def test_the_router_of_a_single_expert_learns_from_the_output() -> None:
    layer, hidden = attention(top_k=1), hidden_states()
    layer(hidden)[0].square().sum().backward()
    assert layer.gate.weight.grad is not None
    assert layer.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("settings", [{"heads": 0}, {"head_dim": 0}])
def test_heads_that_cannot_be_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="an expert cannot have"):
        attention(**settings)
