"""Expert choice under the interpreter, against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.canaries import Canaries

pytest.importorskip("triton")
from moehive.kernels.expert_choice import choose_tokens
from moehive.kernels.gpu import expert_choice

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("step", [8, 4096])
@settings(max_examples=6)
@given(
    tokens=st.integers(1, 20),
    num_experts=st.integers(1, 9),
    repeated=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_equal_to_torch(
    tokens: int, num_experts: int, repeated: bool, seed: int, data: st.DataObject, step: int
) -> None:
    capacity = data.draw(st.integers(1, tokens))
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    if repeated:  # ties to the last bit, whoever computes them
        logits = logits[torch.arange(tokens) % 3 % tokens]
    with pytest.MonkeyPatch.context() as patch, Canaries() as guard, guard.allocations():
        patch.setattr(expert_choice, "_TOKENS", step)
        found = expert_choice.choose_tokens_on_gpu(guard(logits), capacity)
    wanted = choose_tokens(logits, capacity)
    # Scores of different rows may come as near as their last bit: then either token is right, and either order.
    ours, theirs = (choice.weights.sort(dim=-1).values for choice in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    if repeated or capacity == tokens:
        assert torch.equal(found.tokens.long(), wanted.tokens)
