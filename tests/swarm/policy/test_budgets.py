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
    ExpertForms,
    MemoryFacts,
    bytes_as_stored,
    disk_budget,
    least_ram,
    plan_budgets,
    ram_budget,
    stays_widened,
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


FORMS = ExpertForms(count=100, stored=25, widened=100, making=25, floor=5, read=0.03, widen=0.01)
forms = st.builds(
    ExpertForms,
    count=st.integers(1, 1000),
    stored=st.integers(1, 1000),
    widened=st.integers(1, 1000),
    making=st.integers(0, 1000),
    floor=st.integers(1, 20),
    read=st.floats(0, 10),
    widen=st.floats(0, 10),
)


@given(st.integers(0, 1 << 20), forms, st.booleans())
def test_what_is_held_as_stored_leaves_room_for_a_token(budget: int, facts: ExpertForms, always: bool) -> None:
    share = bytes_as_stored(budget, facts, always=always)
    assert 0 <= share <= facts.count * facts.stored
    if share:
        assert facts.stored < facts.widened
        assert budget - share >= facts.floor * facts.widened


@pytest.mark.parametrize(
    ("budget", "facts", "share"),
    [
        (100 * 100, FORMS, 0),  # all fits as it is computed with
        (5000, FORMS, 2500),  # the disk is slow: all of it is in memory
        (5000, replace(FORMS, widen=0.3), 0),  # widening is: better half of it ready, the rest from the disk
        (5000, replace(FORMS, stored=100), 0),  # nothing is gained
        (590, FORMS, 0),  # only a token's experts fit
        (700, replace(FORMS, read=1.0), 200),
    ],
)
def test_the_form_that_costs_a_use_the_least_time(budget: int, facts: ExpertForms, share: int) -> None:
    assert bytes_as_stored(budget, facts) == share


@pytest.mark.parametrize(("budget", "stays"), [(1025, True), (1024, False)])
def test_experts_stay_where_the_last_can_be_made_beside_the_others(budget: int, stays: bool) -> None:
    assert stays_widened(budget, replace(FORMS, count=10)) is stays


def test_a_device_that_takes_them_as_stored_decides_the_form() -> None:
    assert bytes_as_stored(100 * 100, FORMS, always=True) == 2500
