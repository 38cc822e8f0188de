"""Experts as they are stored, below the form that is computed with: fewer bytes, and the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moehive.kernels.cpu import packed
from moehive.kernels.cpu.packed import can_pack, is_packed, plain_weights
from moehive.protocol.errors import CorruptShard
from moehive.protocol.ids import ExpertKey
from moehive.swarm import open_local
from moehive.swarm.model import buffers
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.tier import WeightsTier, forms_of
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.policy import Uses

BF16 = torch.bfloat16
QUANTISED = ["gpt_oss_mxfp4", "deepseek_v3_fp8"]


class CountingLoader(ExpertLoader):
    reads = 0

    def read(self, key: ExpertKey) -> StoredExpert:
        self.reads += 1
        return super().read(key)


def loader_of(converted: Path) -> CountingLoader:
    directory = ConvertedDirectory(converted)
    return CountingLoader(directory.manifest, directory)


def generate(model: Any, prompt: Tensor) -> Tensor:
    mask = torch.ones_like(prompt)
    found: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return found


@pytest.mark.parametrize("family", QUANTISED)
def test_what_fits_as_stored_is_read_once_and_nothing_changes(checkpoints: Any, family: str, prompt: Tensor) -> None:
    converted = checkpoints.converted(family)
    loader = loader_of(converted)
    experts = len(loader.manifest.experts)
    forms = forms_of(loader, BF16, experts)
    everything = experts * forms.stored + (forms.floor + 1) * forms.widened
    budget = min(everything, experts * forms.widened * 3 // 4)
    wanted = open_local(converted, prefetch=False)[0]
    backend = LocalExperts(loader, WeightsTier(loader, budget))
    backend.tier.hold_stored(BF16, experts, uploads=True)
    served, _ = open_local(converted, backend=backend)
    with torch.inference_mode():
        assert torch.equal(served(input_ids=prompt).logits, wanted(input_ids=prompt).logits)
    assert torch.equal(generate(served, prompt), generate(wanted, prompt))
    stored = backend.stored_stats
    assert stored is not None
    assert loader.reads == stored.loads
    assert backend.tier_stats.evictions > 0
    assert (stored.evictions == 0) == (stored.loads <= experts) == (budget == everything)
    assert stored.hits > 0
    assert stored.resident_bytes + backend.tier_stats.resident_bytes <= budget
    assert stored.budget_bytes + backend.tier_stats.budget_bytes == budget
    backend.tier.close()


@pytest.mark.parametrize("family", QUANTISED)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_what_is_widened_from_memory_is_what_is_read(checkpoints: Any, family: str, dtype: torch.dtype) -> None:
    loader = loader_of(checkpoints.converted(family))
    tier = WeightsTier(loader, 1 << 30)
    tier.stored.resize(1 << 29)
    for key in loader.manifest.experts:
        wanted = [tensor.clone() for tensor in loader.load(key, dtype).tensors]
        with tier.lease((key, dtype)) as weights:
            assert all(torch.equal(a, b) for a, b in zip(weights.tensors, wanted, strict=True))
        with tier.as_stored(key) as matrices:
            assert matrices.nbytes <= loader.stored_room(key)
    assert tier.stats.resident_bytes <= len(loader.manifest.experts) * loader.widened_room(dtype)
    tier.close()


@pytest.mark.parametrize("family", [*QUANTISED, "qwen3_moe", "gpt_oss"])
def test_where_all_fits_or_nothing_is_gained_nothing_is_held_as_stored(checkpoints: Any, family: str) -> None:
    loader = loader_of(checkpoints.converted(family))
    experts = len(loader.manifest.experts)
    for budget in (2 * loader.total_room(BF16), loader.largest_room(BF16) * 5):
        tier = WeightsTier(loader, budget)
        tier.hold_stored(BF16, experts, uploads=False)
        if budget > loader.total_room(BF16) or family not in QUANTISED:
            assert tier.stored_stats is None
            assert tier.budget_bytes == budget


def test_a_budget_is_divided_anew_when_more_experts_are_held(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("gpt_oss_mxfp4"))
    forms = forms_of(loader, BF16, 1)
    budget = (forms.floor + 4) * forms.widened
    tier = WeightsTier(loader, budget)
    tier.hold_stored(BF16, 4, uploads=True)
    first = tier.stored.budget_bytes
    tier.hold_stored(BF16, 8, uploads=True)
    assert 0 < first < tier.stored.budget_bytes
    assert tier.stored.budget_bytes + tier.budget_bytes == budget


def test_an_error_of_reading_reaches_who_leases(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("gpt_oss_mxfp4"))

    def read(key: ExpertKey) -> StoredExpert:
        raise CorruptShard("changed")

    tier = WeightsTier(loader, 1 << 30, read=read)
    tier.stored.resize(1 << 29)
    key = next(iter(loader.manifest.experts))
    with pytest.raises(CorruptShard, match="changed"), tier.lease((key, BF16)):
        pass
    with pytest.raises(CorruptShard, match="changed"), tier.as_stored(key):
        pass


def test_buffers_of_what_is_widened_are_used_again(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    keys = list(loader.manifest.experts)
    tensors, before = loader.read(keys[0]), loader.buffers.fresh
    for _ in range(3):
        weights = loader.widen(keys[0], tensors, torch.float32)
        assert len({tensor.untyped_storage().data_ptr() for tensor in weights.tensors}) == 1
        del weights
    assert loader.buffers.fresh - before <= 1


@pytest.mark.parametrize("share", [0, 1])
def test_free_buffers_are_within_the_budget(checkpoints: Any, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised experts leave a free shard's buffer behind, which must not come on top of a full tier."""
    monkeypatch.setattr(buffers, "SMALLEST", 0)  # those of the tests are tiny
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    room, stored = loader.widened_room(BF16), max(map(loader.stored_room, loader.manifest.experts))
    tier = WeightsTier(loader, 7 * room + share * 4 * stored)
    tier.stored.resize(share * 4 * stored)
    tier.resize(7 * room)
    reused, fullest = 0, 0
    for layer in loader.manifest.model.moe_layers * 2:
        keys = [(ExpertKey(layer, expert), BF16) for expert in range(loader.num_experts)]
        tier.note(Uses(layer, dict.fromkeys(keys, 1)))
        for key in keys:
            with tier.lease(key):
                assert loader.buffers.taken_bytes <= 7 * room + share * 4 * stored
                fullest = max(fullest, tier.resident_bytes)
        reused = loader.buffers.reused
    tier.close()
    assert reused > loader.buffers.fresh
    assert fullest + loader.widened_room(BF16) > tier.budget_bytes - stored, "the tier was never full"


@pytest.mark.skipif(not can_pack(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("fits", [True, False])
def test_experts_that_stay_are_packed(
    checkpoints: Any, fits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_SMALLEST", 64)  # those of the tests are tiny
    loader = loader_of(checkpoints.converted("qwen3_moe"))
    experts = len(loader.manifest.experts)
    budget = (experts + 1) * forms_of(loader, dtype, experts).widened - (0 if fits else 1)
    tier = WeightsTier(loader, budget)
    tier.hold_stored(dtype, experts, may_pack=True)
    for key in loader.manifest.experts:
        wanted = loader.load(key, dtype)
        with tier.lease((key, dtype)) as weights:
            assert is_packed(weights) == (fits and dtype == BF16)
            for found, tensor in zip(plain_weights(weights).tensors, wanted.tensors, strict=True):
                assert torch.equal(found, tensor)
    assert tier.stats.resident_bytes <= budget
    assert tier.stats.entries == experts
    tier.close()
