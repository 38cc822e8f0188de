"""Three node processes with some of the experts each, a client with none: transformers' tokens, and its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Checkpoints
from support.choices import know
from support.processes import Nodes
from torch import Tensor
from transformers import AutoModelForCausalLM

from moehive.swarm.client import join
from moehive.swarm.model.kv.options import KvOptions

pytestmark = pytest.mark.swarm

STEPS = 8
TOKENS = 24

FAMILIES = ("demo", "phimoe", "gpt_oss_mxfp4", "deepseek_v3_fp8", "kimi_k2_int4", "qwen3_moe_awq", "qwen3_next")


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    """Token ids [2, 12]."""
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits_of(model: Any, prompt: Tensor) -> list[Tensor]:
    """Logits of a prefill and of greedy cached steps."""
    answer = model(input_ids=prompt, use_cache=True)
    seen = [answer.logits]
    for _ in range(STEPS):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
        seen.append(answer.logits)
    return seen


def tokens_of(model: Any, prompt: Tensor) -> Tensor:
    """What `generate` gives, greedy."""
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False)
    assert isinstance(tokens, Tensor)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_both_forms_and_the_same_bits_in_rows(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, prompt: Tensor, family: str, tmp_path: Path
) -> None:
    founder, *others = nodes.swarm(checkpoints.converted(family), "*:0-3", "*:3-5", "*:5-7")
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoints.reference(family), dtype=torch.float32, experts_implementation="eager"
    )
    with join(founder.ticket, cache=cache) as swarm:
        model_id = founder.ready()["modelId"]
        know(swarm, model_id, (founder, *others))
        exact, _ = swarm.load(model_id, dtype=torch.float32, answers="rows")
        quick, _ = swarm.load(model_id, dtype=torch.float32, answers="sum")
        kv = KvOptions("spill", budget=1 << 18, block_tokens=8, directory=tmp_path)
        spilling, _ = swarm.load(model_id, dtype=torch.float32, answers="rows", kv=kv)
        wanted = tokens_of(reference, prompt)
        assert torch.equal(tokens_of(exact, prompt), wanted)
        assert torch.equal(tokens_of(quick, prompt), wanted)
        assert torch.equal(tokens_of(spilling, prompt), wanted)
        pairs = zip(logits_of(exact, prompt), logits_of(reference, prompt), strict=True)
        assert [torch.equal(found, expected) for found, expected in pairs] == [True] * (1 + STEPS)
        stats = swarm.stats(model_id)
    assert {peer for peer, one in stats.peers.items() if one.rows} == {node.peer for node in (founder, *others)}
    assert stats.local_rows == stats.retries == 0
