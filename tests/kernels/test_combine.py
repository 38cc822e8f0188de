"""Sums of experts' rows."""

from __future__ import annotations

import pytest
import torch

from moehive.kernels import combine
from moehive.kernels.combine import add_all_choices, add_weighted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "choices"), [(1, 3), (7, 1), (40, 4)])
def test_all_choices_are_added_in_the_same_order(
    tokens: int, choices: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine, "_MANY", 1)
    generator = torch.Generator().manual_seed(tokens)
    token = torch.arange(tokens).repeat(choices)[torch.randperm(tokens * choices, generator=generator)]
    rows = torch.randn(tokens * choices, 24, generator=generator).to(dtype)
    weights = torch.rand(tokens * choices, generator=generator)
    found, wanted = torch.zeros(tokens, 24), torch.zeros(tokens, 24)
    add_all_choices(found, token, rows, weights)
    add_weighted(wanted, token, rows, weights)
    assert torch.equal(found, wanted)
