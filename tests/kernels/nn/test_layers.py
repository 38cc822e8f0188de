"""Layers: equal to transformers' blocks, what they report, how each keeps its experts loaded, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moehive.kernels.nn import (
    Balance,
    ExpertChoiceLayer,
    LayerReport,
    LossFreeMoELayer,
    MoEConfig,
    MoELayer,
    build_layer,
    for_moe,
)
from moehive.kernels.telemetry import load_balance_coefficient

HIDDEN = 12
CONFIG = MoEConfig(HIDDEN, 10, 6, 2, balance_coefficient=0.1, z_coefficient=0.01)


def config(balance: Balance) -> MoEConfig:
    if balance is Balance.SWITCH:
        return replace(CONFIG, balance=balance, top_k=1, capacity_factor=1.0, eval_capacity_factor=1.0)
    return replace(CONFIG, balance=balance, bias_update_rate=0.01)


def layer(balance: Balance, dtype: torch.dtype = torch.float32) -> MoELayer | ExpertChoiceLayer:
    torch.manual_seed(0)
    return build_layer(config(balance)).to(dtype)


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("balance", Balance)
def test_gradients(balance: Balance) -> None:
    """Output and losses, to the hidden states and every parameter."""
    learning = layer(balance, torch.float64)
    names, values = zip(*learning.named_parameters(), strict=True)

    def run(hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        output, report = torch.func.functional_call(learning, dict(zip(names, parameters, strict=True)), (hidden,))
        return output, report.loss

    leaves = (hidden_states(5, dtype=torch.float64), *(value.detach() for value in values))
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves), fast_mode=True)


def test_a_layer_equals_the_block_of_transformers() -> None:
    block_config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=10, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    )
    block_config._experts_implementation = "eager"
    block, ours = Qwen3MoeSparseMoeBlock(block_config), layer(Balance.AUXILIARY)
    block.load_state_dict(ours.state_dict())  # the same names and shapes
    hidden = hidden_states(2, 7)
    torch.testing.assert_close(ours(hidden)[0], block(hidden), rtol=1e-6, atol=1e-6)


def test_a_loss_free_layer_chooses_as_deepseek_v3_does() -> None:
    ours = layer(Balance.LOSS_FREE)
    assert ours.gate.e_score_correction_bias is not None
    ours.gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(2))
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(hidden_size=HIDDEN, n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1,
                         routed_scaling_factor=1.0, norm_topk_prob=True)
    )  # fmt: skip
    theirs.load_state_dict(ours.gate.state_dict())
    hidden = hidden_states(30)
    gating, (_, weights, experts) = ours.gate(hidden), theirs(hidden)
    assert torch.equal(gating.experts, experts)
    torch.testing.assert_close(gating.weights, weights)


@pytest.mark.parametrize("balance", [Balance.NONE, Balance.AUXILIARY, Balance.LOSS_FREE])
def test_reports_of_layers_that_drop_nothing(balance: Balance) -> None:
    _, report = layer(balance)(hidden_states(4, 5))
    assert (int(report.counts.sum()), int(report.dropped)) == (4 * 5 * 2, 0)


def test_a_switch_layer_drops_what_finds_no_room() -> None:
    learning = layer(Balance.SWITCH)
    hidden = hidden_states(1).expand(12, HIDDEN)  # twelve equal tokens for one expert with room for two
    output, report = learning(hidden)
    assert sorted(report.counts.tolist()) == [0, 0, 0, 0, 0, 12]
    assert int(report.dropped) == 10
    assert output[:2].abs().max() > 0
    assert (output[2:] == 0).all()


def test_expert_choice_loads_every_expert_equally() -> None:
    learning, hidden = layer(Balance.EXPERT_CHOICE), hidden_states(15)
    output, report = learning(hidden)
    assert report.counts.tolist() == [5] * 6  # 15 tokens times 2, over 6 experts
    without = (output == 0).all(dim=1)
    assert int(report.dropped) == int(without.sum())
    scores = learning.gate(hidden).softmax(dim=-1)  # [T, E]
    wanted = torch.zeros_like(hidden)
    for expert in range(6):
        token = scores[:, expert].topk(5).indices.sort().values
        one_hot = torch.full((5, 1), expert), scores[token, expert][:, None]
        wanted[token] += learning.experts(hidden[token], *one_hot)
    torch.testing.assert_close(output, wanted)


def test_the_bias_moves_against_the_load() -> None:
    learning = layer(Balance.LOSS_FREE)
    assert isinstance(learning, LossFreeMoELayer)
    bias = learning.gate.e_score_correction_bias
    assert bias is not None
    learning.update_bias()
    assert (bias == 0).all()  # nothing seen, nothing moved
    _, first = learning(hidden_states(3, 7))
    _, second = learning(hidden_states(20))
    load = first.counts + second.counts
    assert torch.equal(learning.load, load)
    learning.update_bias()
    torch.testing.assert_close(bias, 0.01 * torch.sign(load.float().mean() - load))
    assert not learning.load.any()
    learning.update_bias(torch.tensor([9, 0, 0, 0, 0, 0]))  # the sum over all ranks
    torch.testing.assert_close(bias[0], 0.01 * torch.sign(load.float().mean() - load)[0] - 0.01)
    learning.eval()(hidden_states(4))
    assert not learning.load.any()


@pytest.mark.parametrize("balance", [Balance.AUXILIARY, Balance.LOSS_FREE])
def test_balancing_evens_a_skewed_router(balance: Balance) -> None:
    """Nothing but balance to learn: what starts far from even ends near it."""
    learning = layer(balance)
    with torch.no_grad():
        learning.gate.weight[0] += learning.gate.weight.abs().max() * 3
    hidden = hidden_states(256) + 1.0
    before = load_balance_coefficient(learning(hidden)[1].counts)
    optimizer = torch.optim.Adam([learning.gate.weight], lr=0.05)
    for _ in range(200):
        _, report = learning(hidden)
        if balance is Balance.AUXILIARY:
            optimizer.zero_grad()
            report.loss.backward()
            optimizer.step()
        else:
            learning.update_bias()
    assert before > 1.5
    assert load_balance_coefficient(learning(hidden)[1].counts) < 1.2


def test_sizes_give_sensible_settings() -> None:
    moe = for_moe(1024, 64, 8, balance="loss-free")
    assert (moe.intermediate_size, moe.balance, moe.bias_update_rate) == (352, Balance.LOSS_FREE, 0.001)
    assert moe.router.correction_bias
    active = 8 * 3 * 1024 * moe.intermediate_size
    assert active == pytest.approx(3 * 1024 * 1024 * 8 / 3, rel=0.05)  # of the dense network of this size
    switch = for_moe(64, 8, 1, balance=Balance.SWITCH)
    assert (switch.capacity_factor, switch.jitter, switch.router.normalize) == (1.25, 0.01, False)
    assert for_moe(64, 8, 2, intermediate_size=48).intermediate_size == 48
    assert (for_moe(64, 8).top_k, for_moe(64, 8, balance="switch").top_k) == (2, 1)
    for balance in Balance:
        made = build_layer(for_moe(HIDDEN, 4, balance=balance))
        output, report = made(hidden_states(2, 3))
        assert output.shape == (2, 3, HIDDEN)
        assert isinstance(report, LayerReport)
        assert bool(report.loss != 0) == (balance in (Balance.AUXILIARY, Balance.SWITCH))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((64, 4, 5), {}, "top_k 5 of 4 experts"),
        ((64, 4, 2), {"balance": "switch"}, "one expert per token, not 2"),
        ((64, 4, 2), {"balance": "hope"}, "'hope' is not a valid Balance"),
        ((64, 0, 1), {}, "every size must be at least 1"),
        ((64, 4, 0), {}, "every size must be at least 1"),
        ((64, 4, 2), {"activation": "tanhh"}, "unknown activation 'tanhh'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    arguments: tuple[int, int, int], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        for_moe(*arguments, **settings)  # type: ignore[arg-type]


def test_negative_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        replace(CONFIG, balance_coefficient=-0.01)
