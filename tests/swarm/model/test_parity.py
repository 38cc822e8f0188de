"""Converted models against transformers' eager experts on the source checkpoint, bit for bit, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

import moehive.swarm

STEPS = 8

# An FP8 checkpoint in fp32 has more precise weights than its bf16 twin: there is no reference to be equal to.
CASES = [
    pytest.param(family, dtype, id=f"{family}-{str(dtype).removeprefix('torch.')}")
    for family in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
    if (family, dtype) != ("deepseek_v3_fp8", torch.float32)
]


@torch.inference_mode()
def behaviour(model: Any, prompt: Tensor) -> list[Tensor]:
    """Logits of a prefill and of greedy cached steps, with batch 2 and batch 1, and the tokens of `generate`."""
    seen = []
    for ids in (prompt, prompt[:1, :9]):
        answer = model(input_ids=ids, use_cache=True)
        seen.append(answer.logits)
        for _ in range(STEPS):
            token = answer.logits[:, -1:].argmax(-1)
            answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
            seen.append(answer.logits)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, do_sample=False)
    return [*seen, tokens]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_equal_to_eager_bit_for_bit(checkpoints: Any, prompt: Tensor, family: str, dtype: torch.dtype) -> None:
    # Both are read from files: a freshly built model lies otherwise in memory, and fp32 GEMV rounds by alignment.
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoints.reference(family), dtype=dtype, experts_implementation="eager"
    )
    model, _ = moehive.swarm.open_local(checkpoints.converted(family), dtype=dtype)
    wanted, found = behaviour(reference, prompt), behaviour(model, prompt)
    assert [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)
    assert wanted[0].dtype == dtype
