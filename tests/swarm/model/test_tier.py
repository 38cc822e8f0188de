"""Experts as they are stored, below the form that is computed with: fewer bytes, and the same results."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixed_loader import MixedLoader
from torch import Tensor

from moehive.kernels.cpu import packed
from moehive.kernels.cpu.packed import can_pack, is_packed, plain_weights
from moehive.kernels.expert_ffn import ExpertWeights
from moehive.protocol.errors import BudgetTooSmall, CorruptShard
from moehive.protocol.ids import ExpertKey
from moehive.swarm import open_local
from moehive.swarm.model import buffers
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.buffers import HostBuffers
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.seats import tier_statistics
from moehive.swarm.model.tier import WeightsTier, forms_of, packed_forms
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.policy import Uses

BF16 = torch.bfloat16
QUANTISED = ["gpt_oss_mxfp4", "deepseek_v3_fp8"]
PACKED = ["kimi_k2_int4", "qwen3_moe_awq", "mixtral_gptq"]


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
def test_the_least_memory_that_is_named_works(checkpoints: Any, family: str, prompt: Tensor) -> None:
    """In RAM, and in RAM and a device's memory at a time; and one byte less is refused."""
    converted = checkpoints.converted(family)
    wanted = open_local(converted, prefetch=False)[0]
    with pytest.raises(BudgetTooSmall) as ram:
        open_local(converted, ram=1)
    with pytest.raises(BudgetTooSmall) as both:
        open_local(converted, ram=ram.value.needed, vram=1)
    for refused in ({"ram": ram.value.needed - 1}, {"ram": ram.value.needed, "vram": both.value.needed - 1}):
        with pytest.raises(BudgetTooSmall):
            open_local(converted, **refused)
    for least in ({"ram": ram.value.needed}, {"ram": ram.value.needed, "vram": both.value.needed}):
        tight = open_local(converted, **least)[0]
        with torch.inference_mode():
            assert torch.equal(tight(input_ids=prompt).logits, wanted(input_ids=prompt).logits)
        assert torch.equal(generate(tight, prompt[:1]), generate(wanted, prompt[:1]))
        stats = tier_statistics(tight)
        assert stats is not None
        assert stats.evictions > 0
        assert stats.resident_bytes <= stats.budget_bytes <= ram.value.needed


@pytest.mark.parametrize("family", QUANTISED)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_what_is_widened_from_memory_is_what_is_read(checkpoints: Any, family: str, dtype: torch.dtype) -> None:
    loader = loader_of(checkpoints.converted(family))
    tier = WeightsTier(loader, 1 << 30)
    tier.hold_stored(dtype, len(loader.manifest.experts), uploads=True)
    assert tier.stored_stats is not None
    for key in loader.manifest.experts:
        wanted = [tensor.clone() for tensor in loader.load(key, dtype).tensors]
        with tier.lease((key, dtype)) as weights:
            assert all(torch.equal(a, b) for a, b in zip(weights.tensors, wanted, strict=True))
        with tier.as_stored(key) as matrices:
            assert matrices.nbytes <= loader.stored_room(key)
    assert tier.stats.resident_bytes <= len(loader.manifest.experts) * loader.widened_room(dtype)
    tier.close()


@pytest.mark.parametrize("family", ["qwen3_moe_awq", "mixtral_gptq"])
def test_an_expert_that_is_turned_has_room_for_both_forms(checkpoints: Any, family: str) -> None:
    loader = loader_of(checkpoints.converted(family))
    for key, shard in loader.manifest.experts.items():
        tensors = loader.read(key)
        assert {name.rpartition(".")[2] for name in tensors} == {
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
        }
        turned = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        assert turned <= loader.stored_size(key)
        assert shard.size + turned <= loader.stored_room(key) <= loader.room(key, BF16)


@pytest.mark.parametrize("family", [*QUANTISED, *PACKED, "qwen3_moe", "gpt_oss"])
def test_where_all_fits_or_nothing_is_gained_nothing_is_held_as_stored(checkpoints: Any, family: str) -> None:
    loader = loader_of(checkpoints.converted(family))
    experts = len(loader.manifest.experts)
    for budget in (2 * loader.total_room(BF16), loader.largest_room(BF16) * 5):
        tier = WeightsTier(loader, budget)
        tier.hold_stored(BF16, experts, uploads=False)
        if budget > loader.total_room(BF16) or family in ("qwen3_moe", "gpt_oss"):
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
    tier.hold_stored(BF16, 4, uploads=True)
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


class CountedBuffers(HostBuffers):
    """Knows the most bytes that were ever taken."""

    peak = 0

    def _take(self, size: int) -> Any:
        memory = super()._take(size)
        self.peak = max(self.peak, self.taken_bytes)
        return memory


def counted(loader: ExpertLoader, monkeypatch: pytest.MonkeyPatch) -> CountedBuffers:
    monkeypatch.setattr(buffers, "SMALLEST", 0)  # those of the tests are tiny
    loader.buffers = CountedBuffers()
    return loader.buffers


def walk(tier: WeightsTier, loader: ExpertLoader, dtype: torch.dtype = BF16, turns: int = 2) -> None:
    """Calls of all experts of each layer."""
    for layer in loader.manifest.model.moe_layers * turns:
        keys = [(ExpertKey(layer, expert), dtype) for expert in range(loader.num_experts)]
        tier.note(Uses(layer, dict.fromkeys(keys, 1)))
        for key in keys:
            with tier.lease(key) as weights:
                assert weights.tensors[0].dtype == dtype
                del weights  # kept beyond its lease it would be memory that nobody counts


@pytest.mark.parametrize("uploads", [False, True])
def test_free_buffers_are_within_the_budget(checkpoints: Any, uploads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised experts leave a free shard's buffer behind, which must not come on top of a full tier."""
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    memory, budget = counted(loader, monkeypatch), 12 * loader.widened_room(BF16)
    tier = WeightsTier(loader, budget)
    tier.hold_stored(BF16, len(loader.manifest.experts), uploads=uploads)
    walk(tier, loader)
    tier.close()
    assert memory.peak <= budget
    assert memory.peak > budget - 2 * loader.widened_room(BF16), "the tier was never full"
    assert memory.reused > memory.fresh


def test_a_budget_is_divided_anew_while_experts_are_loaded(checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    memory, experts = counted(loader, monkeypatch), len(loader.manifest.experts)
    budget = 14 * loader.widened_room(BF16)
    tier = WeightsTier(loader, budget)

    def work() -> None:
        for turn in range(4):
            walk(tier, loader, turns=1)
            for key in list(loader.manifest.experts)[turn::5]:
                with tier.as_stored(key) as matrices:
                    assert matrices.nbytes <= loader.stored_room(key)
                    del matrices

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work) for _ in range(3)]
        turn = 0
        while not all(one.done() for one in working):
            tier.hold_stored(BF16, experts if turn % 3 else 2, uploads=turn % 2 == 0)
            turn += 1
        for one in working:
            one.result()
    tier.close()
    assert turn > 3
    assert memory.peak <= budget
    assert tier.stats.reserved_bytes == tier.stored.stats.reserved_bytes == 0
    tier._grow()
    assert tier.budget_bytes + tier.stored.budget_bytes == budget


def test_a_part_grows_only_by_what_the_other_has_released(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    experts, whole = len(loader.manifest.experts), 14 * loader.widened_room(BF16)
    tier = WeightsTier(loader, whole)
    with tier.borrow(whole // 2, "a test"):
        with tier.borrow(whole // 2, "a test"):
            tier.hold_stored(BF16, experts, uploads=True)
            assert tier.stats.reserved_bytes + tier.stored.budget_bytes == whole
        walk(tier, loader, turns=1)
        share = tier.stored.budget_bytes
        assert share > 0
        assert tier.budget_bytes + share == whole
        with tier.stored.borrow(share, "a test"):
            tier.hold_stored(BF16, 1)
            assert tier.budget_bytes == whole - share
            walk(tier, loader, turns=1)
            assert tier.budget_bytes == whole - share, "it grew by bytes that are lent"
    tier.hold_stored(BF16, 1)
    assert tier.stored.budget_bytes == max(map(loader.stored_room, loader.manifest.experts))
    assert tier.budget_bytes + tier.stored.budget_bytes == whole
    tier.close()


def test_a_load_under_way_takes_what_was_promised_to_it(checkpoints: Any) -> None:
    """Room was promised for a shard and its weights; what is divided anew meanwhile is for later loads."""
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    first, second = list(loader.manifest.experts)[:2]
    tries: list[ExpertKey] = []

    def read(key: ExpertKey) -> StoredExpert:
        tries.append(key)
        if len(tries) == 1:
            tier.hold_stored(BF16, len(loader.manifest.experts), uploads=True)
            raise MemoryError  # so that it is tried again
        return loader.read(key)

    tier = WeightsTier(loader, 30 * loader.widened_room(BF16), read=read)
    with tier.lease((first, BF16)):
        assert tier.stored.budget_bytes > 0
        assert tier.stored.stats.loads == 0
    tier.resize(30 * loader.widened_room(BF16))
    with tier.lease((second, BF16)):
        assert tier.stored.stats.loads == 1
    assert tries == [first, first, second]
    tier.close()


def test_a_division_does_not_bring_back_memory_that_the_machine_does_not_have(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    experts, failing = len(loader.manifest.experts), [False] * 9 + [True]

    def read(key: ExpertKey) -> StoredExpert:
        if failing and failing.pop(0):
            raise MemoryError
        return loader.read(key)

    tier = WeightsTier(loader, 1 << 30, read=read)
    tier.hold_stored(BF16, 1)
    walk(tier, loader, turns=1)
    left = tier.budget_bytes
    assert tier.stats.shrinks == 1
    assert left < 1 << 30
    for uploads in (False, True, False):
        tier.hold_stored(BF16, experts, uploads=uploads)
        assert tier.budget_bytes + tier.stored.budget_bytes == left
    tier.close()


def test_memory_that_ends_in_the_part_below_shrinks_the_part_above(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))
    failing = [False] * 9 + [True, True]

    def read(key: ExpertKey) -> StoredExpert:
        if failing and failing.pop(0):
            raise MemoryError
        return loader.read(key)

    tier = WeightsTier(loader, 1 << 30, read=read)
    tier.hold_stored(BF16, len(loader.manifest.experts), uploads=True)
    walk(tier, loader, turns=1)
    assert (tier.stored.stats.shrinks, tier.stats.shrinks) == (1, 1)
    tier.close()


@pytest.mark.parametrize("uploads", [False, True])
def test_experts_that_are_stored_in_two_forms_have_their_values(checkpoints: Any, uploads: bool) -> None:
    """Those in bf16 are views of what was read, the others are widened."""
    directory = ConvertedDirectory(checkpoints.converted("deepseek_v3_fp8"))
    loader = MixedLoader(directory.manifest, directory)
    budget = 12 * loader.largest_room(BF16)
    tier = WeightsTier(loader, budget)
    tier.hold_stored(BF16, len(loader.manifest.experts), uploads=uploads)
    walk(tier, loader)
    for key in loader.manifest.experts:
        wanted = loader.load(key, BF16)
        with tier.lease((key, BF16)) as weights:
            assert all(torch.equal(a, b) for a, b in zip(weights.tensors, wanted.tensors, strict=True))
    assert tier.resident_bytes + tier.stored.resident_bytes <= budget
    tier.close()


@pytest.mark.skipif(not can_pack(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("fits", [True, False])
def test_experts_that_stay_are_packed(
    checkpoints: Any, fits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bytes that packing takes, and none leaves for another; one byte less, and none is packed."""
    monkeypatch.setattr(packed, "_SMALLEST", 64)  # those of the tests are tiny
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"))  # whose shapes are no whole blocks
    memory, experts = counted(loader, monkeypatch), len(loader.manifest.experts)
    forms = forms_of(loader, dtype, experts)
    room = packed_forms(loader, forms) if dtype == BF16 else forms
    assert dtype != BF16 or room.widened > forms.widened, "packing takes no more: nothing is tested"
    budget = experts * room.widened + room.making - (0 if fits else 1)
    tier = WeightsTier(loader, budget)
    tier.hold_stored(dtype, experts, may_pack=True)
    for key in [*loader.manifest.experts] * 2:
        wanted = loader.load(key, dtype)
        with tier.lease((key, dtype)) as weights:
            assert is_packed(weights) == (fits and dtype == BF16)
            for found, tensor in zip(plain_weights(weights).tensors, wanted.tensors, strict=True):
                assert torch.equal(found, tensor)
    stats = tier.stats
    assert stats.resident_bytes <= budget
    assert not is_packed(weights) or memory.free_bytes == 0, "beside packed ones they would be beyond the budget"
    if fits or dtype == BF16:
        assert (stats.loads, stats.evictions, stats.entries) == (experts, 0, experts)
    tier.close()


@pytest.mark.skipif(not can_pack(), reason="this processor has no bf16 products")
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_most_that_packing_takes(rows: int, columns: int) -> None:
    weights = ExpertWeights(torch.zeros(2 * rows, columns, dtype=BF16), torch.zeros(columns, rows, dtype=BF16))
    made = packed.pack_weights(weights)
    sizes = [packed.packed_bytes(one) if one.is_mkldnn else one.nbytes for one in made.tensors]
    assert sizes[0] <= packed.most_packed_bytes(2 * rows, columns)
    assert sizes[1] <= packed.most_packed_bytes(columns, rows)
