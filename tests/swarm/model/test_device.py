"""Experts in device memory, in a running model: the processor as the device, and one whose copies come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moehive.swarm import open_local
from moehive.swarm.model.device import DeviceExperts, ExpertLayout
from moehive.swarm.model.seats import backend_of, device_statistics, tier_statistics
from moehive.swarm.store.directory import ConvertedDirectory


def generate(model: Any, prompt: Tensor) -> Tensor:
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    return found


def logits(model: Any, prompt: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=prompt).logits
    return found


def slot_bytes(converted: Path) -> int:
    return ExpertLayout.of(ConvertedDirectory(converted).manifest.model, torch.bfloat16).nbytes


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("slots", ["floor", "half", "all"])
def test_tokens_and_logits_are_those_of_the_plain_path(
    checkpoints: Any, family: str, slots: str, prompt: Tensor
) -> None:
    converted = checkpoints.converted(family)
    model = ConvertedDirectory(converted).manifest.model
    experts = len(model.moe_layers) * model.num_experts
    count = {"floor": 2 * model.top_k + 1, "half": experts // 2, "all": experts}[slots]
    plain, _ = open_local(converted, prefetch=False)
    tiered, _ = open_local(converted, device="cpu", vram=count * slot_bytes(converted))
    assert isinstance(backend_of(tiered), DeviceExperts)
    assert torch.equal(logits(tiered, prompt), logits(plain, prompt))
    assert torch.equal(generate(tiered, prompt[:1]), generate(plain, prompt[:1]))
    assert torch.equal(generate(tiered, prompt), generate(plain, prompt))
    stats = device_statistics(tiered)
    assert stats is not None
    assert stats.hits > 0 and stats.loads > 0
    assert (stats.evictions > 0) == (slots != "all")
