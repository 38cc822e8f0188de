"""Experts in device memory, in a running model: the processor as the device, and one whose copies come late."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_accelerator import FakeAccelerator
from support.mixed_loader import MixedLoader
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, ConfigError
from moehive.swarm import open_local
from moehive.swarm.model import device
from moehive.swarm.model.device import DeviceExperts, ExpertLayout
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.seats import backend_of, device_statistics
from moehive.swarm.model.slots import StoredLayout
from moehive.swarm.model.tier import WeightsTier
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
    assert stats.hits > 0
    assert stats.loads > 0
    assert (stats.evictions > 0) == (slots != "all")


@pytest.mark.parametrize("stored", [False, True])
def test_a_checkpoint_that_is_stored_in_two_forms_gives_the_same_tokens(
    checkpoints: Any, stored: bool, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP8 with some experts in bf16: in slots as they are computed with, and as they are stored."""
    directory = ConvertedDirectory(checkpoints.converted("deepseek_v3_fp8"))
    loader = MixedLoader(directory.manifest, directory)
    assert len({id(form) for form in loader.forms.values()}) == 2
    if stored:  # as a GPU has them; torch's products widen them
        layout = StoredLayout.of(loader, torch.bfloat16)
        assert layout is not None
        monkeypatch.setattr(device, "slot_layout", lambda *_, **__: layout)
    plain, _ = open_local(directory.root, prefetch=False)
    ram, accelerator = WeightsTier(loader, 1 << 30), FakeAccelerator(eager=True)
    budget = (2 * loader.top_k + 2) * slot_bytes(directory.root)
    backend = DeviceExperts(loader, ram, accelerator, torch.bfloat16, budget)
    ram.hold_stored(torch.bfloat16, len(directory.manifest.experts), uploads=stored)
    assert backend.takes_stored is stored
    served, _ = open_local(directory.root, backend=backend)
    assert torch.equal(logits(served, prompt), logits(plain, prompt))
    assert torch.equal(generate(served, prompt[:1]), generate(plain, prompt[:1]))
    assert backend.device_stats.evictions > 0
    close(backend, accelerator)


def test_what_is_computed_waits_for_copies_that_come_late(converted: Path, prompt: Tensor) -> None:
    """On a device that makes a copy only when what computes was told to wait for it: else slots hold garbage."""
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    plain, _ = open_local(converted, prefetch=False)
    accelerator = FakeAccelerator(eager=True)
    budget = (2 * loader.top_k + 2) * slot_bytes(converted)
    backend = DeviceExperts(loader, WeightsTier(loader, 1 << 30), accelerator, torch.bfloat16, budget)
    served, _ = open_local(converted, backend=backend)
    assert torch.equal(logits(served, prompt), logits(plain, prompt))
    assert torch.equal(generate(served, prompt[:1]), generate(plain, prompt[:1]))
    assert accelerator.copies > 0
    assert accelerator.allocated <= budget
    close(backend, accelerator)


def close(backend: DeviceExperts, accelerator: FakeAccelerator) -> None:
    """While the device goes on."""
    closing = threading.Thread(target=backend.close)
    closing.start()
    while closing.is_alive():
        accelerator.finish()
        closing.join(0.001)


def test_a_device_without_memory_leaves_all_to_the_processor(converted: Path, prompt: Tensor) -> None:
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    plain, _ = open_local(converted, prefetch=False)
    backend = DeviceExperts(loader, WeightsTier(loader, 1 << 30), FakeAccelerator(limit=0), torch.bfloat16, 1 << 30)
    served, _ = open_local(converted, backend=backend)
    assert torch.equal(logits(served, prompt), logits(plain, prompt))
    assert backend.device_stats.entries == 0
    backend.close()


def test_a_budget_below_the_floor_names_the_least_that_works(converted: Path) -> None:
    least = (2 * ConvertedDirectory(converted).manifest.model.top_k + 1) * slot_bytes(converted)
    with pytest.raises(BudgetTooSmall) as caught:
        open_local(converted, device="cpu", vram=least - 1)
    assert (caught.value.budget, caught.value.needed) == (least - 1, least)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vram": 1 << 30}, "vram is memory of a device: say of which"),
        ({"device": "meta"}, "'meta' has no memory"),
        ({"device": "nonsense"}, "torch finds no device 'nonsense' here"),
    ],
)
def test_what_is_no_place_for_experts_is_refused_before_anything_is_loaded(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        open_local(tmp_path / "not looked for", **options)
