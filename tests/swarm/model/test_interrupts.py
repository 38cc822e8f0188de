"""Ctrl-C anywhere in a layer's experts: nothing stays in use in any tier, and the next call is as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.interrupts import InterruptAt
from support.tiers import wait_until
from torch import Tensor

from moehive.swarm.model import backend, device, device_sums, slots, tier
from moehive.swarm.model.backend import ExpertsBackend, LocalExperts
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.slots import ExpertLayout
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers import device as device_tier
from moehive.swarm.tiers import leases, loading, ram, residency
from moehive.swarm.tiers.accelerator import TorchAccelerator

FILES = {str(module.__file__) for module in (backend, device, device_sums, slots, tier, device_tier)} | {
    str(module.__file__) for module in (leases, loading, ram, residency)
}
TOKENS = 3
EVERY = 23  # places between two that are tried: all of them take minutes


class Call:
    """One layer's call of one token, which finds some of its experts, then of several."""

    def __init__(self, directory: ConvertedDirectory) -> None:
        self._model = directory.manifest.model
        generator = torch.Generator().manual_seed(3)
        self._hidden = torch.randn(TOKENS, self._model.hidden_size, generator=generator).bfloat16()
        self._weights = torch.rand(TOKENS, self._model.top_k, generator=generator)
        chosen = [torch.randperm(self._model.num_experts, generator=generator) for _ in range(TOKENS)]
        self._index = torch.stack(chosen)[:, : self._model.top_k]

    @torch.inference_mode()
    def __call__(self, experts: ExpertsBackend) -> Tensor:
        layer = self._model.moe_layers[0]
        outputs = [
            experts.run(layer, self._hidden[some], self._index[some], self._weights[some])
            for some in (slice(0, 1), slice(1, 2), slice(0, TOKENS))
        ]
        return torch.cat(outputs)


def test_local_experts(converted: Path) -> None:
    directory = ConvertedDirectory(converted)
    loader, call = ExpertLoader(directory.manifest, directory), Call(directory)
    budget = (2 * loader.top_k + 1) * loader.largest_room(torch.bfloat16)
    wanted = call(LocalExperts(loader, WeightsTier(loader, budget)))
    for place in range(1, 20000, EVERY):
        experts = LocalExperts(loader, WeightsTier(loader, budget))
        with InterruptAt(place, FILES) as interrupt:
            call(experts)
        assert_sound(experts.tier, interrupt.where)
        assert torch.equal(call(experts), wanted), interrupt.where
        assert_sound(experts.tier, interrupt.where)
        experts.tier.close()
        if not interrupt.where:
            return
    pytest.fail("a call has no end")


@pytest.mark.parametrize("kernels", [False, True])
def test_experts_on_a_device(converted: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor is the device; with `kernels`, torch adds up what they would."""
    monkeypatch.setattr(device, "grouped_experts", lambda *_: None)
    directory = ConvertedDirectory(converted)
    loader, call = ExpertLoader(directory.manifest, directory), Call(directory)
    floor = 2 * loader.top_k + 1
    budget = floor * loader.largest_room(torch.bfloat16)
    vram = floor * ExpertLayout.of(directory.manifest.model, torch.bfloat16).nbytes

    def fresh() -> DeviceExperts:
        accelerator = TorchAccelerator(torch.device("cpu"))
        return DeviceExperts(loader, WeightsTier(loader, budget), accelerator, torch.bfloat16, vram, kernels=kernels)

    wanted = call(fresh())
    for place in range(1, 20000, EVERY):
        experts = fresh()
        with InterruptAt(place, FILES) as interrupt:
            call(experts)
        assert_slots(experts, interrupt.where)
        assert torch.equal(call(experts), wanted), interrupt.where
        assert_slots(experts, interrupt.where)
        experts.close()
        if not interrupt.where:
            return
    pytest.fail("a call has no end")


def assert_sound(ram: WeightsTier, where: str) -> None:
    for part in (ram, ram.stored):
        wait_until(lambda part=part: not part._flights)  # type: ignore[misc]
        held = part._residency
        assert (held.uses, part._claims, part._borrowed, held.reserved) == (set(), [], [], 0), where
        assert held.resident == sum(held.sizes.values()) <= held.budget, where


def assert_slots(experts: DeviceExperts, where: str) -> None:
    tier, pool = experts.tier._tier, experts.tier._pool
    wait_until(lambda: not tier._flights)
    assert_sound(experts.ram, where)
    assert (tier._residency.uses, tier.stats.reserved_bytes) == (set(), 0), where
    used = {entry.value.slot for entry in tier._residency.entries.values()}
    assert set(pool._free) == set(pool.slots) - used, where
    assert len(pool._free) == len(set(pool._free)), where
