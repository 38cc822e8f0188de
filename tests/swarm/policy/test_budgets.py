"""Budgets from facts: never more than there is, and each with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.budgets import (
    MOST_DISK,
    DeviceFacts,
    DiskFacts,
    MemoryFacts,
    disk_budget,
    least_ram,
    plan_budgets,
    ram_budget,
    video_budget,
)

GIB = 1 << 30
SIZES = st.integers(0, 1 << 42)
PLAIN = MemoryFacts(total=64 * GIB, available=40 * GIB)
DISK = DiskFacts(free=100 * GIB)


@pytest.mark.parametrize(
    ("facts", "bytes_", "said"),
    [
        (PLAIN, 20, "40.0 GiB of 64.0 GiB are available"),
        (replace(PLAIN, limit=30 * GIB, limit_used=10 * GIB, limit_group="/job"), 10, "30.0 GiB in control group /job"),
        (replace(PLAIN, available=4 * GIB, limit=30 * GIB, limit_used=10 * GIB), 2, "4.0 GiB of 64.0 GiB are"),
        (replace(PLAIN, limit=30 * GIB, limit_used=31 * GIB), 0, "0 B of it left"),
        (replace(PLAIN, far=16 * GIB), 12, "without 16.0 GiB in nodes without processors"),
    ],
)
def test_half_of_the_room_is_for_experts(facts: MemoryFacts, bytes_: int, said: str) -> None:
    budget = ram_budget(facts)
    assert budget.bytes == bytes_ * GIB
    assert said in budget.reason


def test_a_discrete_accelerator_keeps_space_for_activations() -> None:
    large, small = DeviceFacts("cuda:0", 80 * GIB, 70 * GIB), DeviceFacts("cuda:1", 8 * GIB, GIB // 2)
    assert video_budget(large).bytes == 63 * GIB
    assert video_budget(replace(large, free=4 * GIB)).bytes == 3 * GIB
    assert video_budget(small).bytes == 0


@pytest.mark.parametrize("name", ["mps", "cuda:0 Orin", "cuda:0 GB10"])
def test_unified_memory_is_counted_once(name: str) -> None:
    facts = replace(PLAIN, devices=[DeviceFacts(name, 64 * GIB, 40 * GIB, unified=True)])
    video, ram, _ = plan_budgets(facts, DISK)
    assert video.bytes == 0
    assert ram.bytes == 20 * GIB
    assert "shared with the accelerator" in ram.reason


def test_a_coherent_superchip_has_two_memories() -> None:
    """GH200: the operating system counts 96 GB of video memory among its own; it is the accelerator's all the same."""
    facts = MemoryFacts(576 * GIB, 500 * GIB, far=90 * GIB, devices=[DeviceFacts("cuda:0 GH200", 96 * GIB, 90 * GIB)])
    video, ram, _ = plan_budgets(facts, DISK)
    assert (video.bytes, ram.bytes) == (81 * GIB, 205 * GIB)


def test_a_full_disk_gets_less_than_the_usual() -> None:
    assert disk_budget(DISK).bytes == MOST_DISK
    assert disk_budget(DiskFacts(free=10 * GIB, held=GIB)).bytes == 10 * GIB
    assert disk_budget(DiskFacts(free=10 * GIB, held=MOST_DISK)).bytes == MOST_DISK


@given(SIZES, SIZES, st.none() | SIZES, SIZES, SIZES, SIZES, st.booleans(), SIZES, SIZES)
def test_no_tier_gets_more_than_is_there(
    total: int, available: int, limit: int | None, used: int, far: int, free: int, unified: bool, disk: int, held: int
) -> None:
    device = DeviceFacts("cuda:0", free, free, unified=unified)
    memory = MemoryFacts(total, available, limit, used, far=far, devices=[device])
    video, ram, store = plan_budgets(memory, DiskFacts(disk, held))
    assert 0 <= video.bytes <= free
    assert 0 <= ram.bytes <= available
    assert limit is None or ram.bytes <= max(0, limit - used)
    assert 0 <= store.bytes <= disk + held


def test_the_least_that_runs_holds_two_layers_of_one_token() -> None:
    assert least_ram(100, top_k=8) == 1700
