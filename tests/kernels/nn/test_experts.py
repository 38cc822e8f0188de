"""Learning experts: equal to transformers' block, one product per active expert, gradients."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moehive.kernels.expert_ffn import expert_ffn
from moehive.kernels.nn import RoutedExperts
from moehive.kernels.nn import experts as module

HIDDEN, INNER, EXPERTS = 8, 6, 5


def experts(dtype: torch.dtype = torch.float64) -> RoutedExperts:
    torch.manual_seed(0)
    return RoutedExperts(HIDDEN, INNER, EXPERTS).to(dtype)


def inputs(choices: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor(choices)
    hidden = torch.randn(index.shape[0], HIDDEN, dtype=dtype, generator=generator)
    return hidden, index, torch.rand(index.shape, dtype=dtype, generator=generator)


CHOICES = {
    "some": [[0, 1], [3, 1], [4, 0]],
    "masked": [[2, 5], [5, 2], [2, 0]],
    "twice": [[1, 1]],
    "none": [[5, 5]],
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_equal_to_transformers(choices: list[list[int]]) -> None:
    ours = experts(torch.float32)
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, experts_implementation="eager"
    )
    theirs = MixtralExperts(config)
    theirs.load_state_dict(ours.state_dict())
    arguments = inputs(choices, torch.float32)
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-6, atol=1e-6)


def test_one_product_for_each_active_expert_over_its_rows() -> None:
    rows: list[int] = []

    def watched(part: Tensor, *rest: object) -> Tensor:
        rows.append(part.shape[0])
        return expert_ffn(part, *rest)  # type: ignore[arg-type]

    with patch.object(module, "expert_ffn", watched):
        experts()(*inputs([[0, 3], [3, 0], [3, 5]]))
    assert rows == [2, 3]


def test_gradients() -> None:
    layer, (hidden, index, weights) = experts(), inputs([[0, 1], [3, 1], [5, 3]])

    def run(hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        found: Tensor = torch.func.functional_call(layer, parameters, (hidden, index, weights))
        return found

    leaves = (hidden, weights, layer.gate_up_proj.detach(), layer.down_proj.detach())
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves))
