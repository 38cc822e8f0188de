"""How working memory is divided and what leaves it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.errors import BudgetTooSmall
from moehive.swarm.model.kv.plan import KvFacts, KvPlan, block_length, divide, missing_on_disk, next_to_spill

sizes = st.integers(1, 1 << 20)
facts_of_any_kind = st.builds(
    KvFacts,
    budget=st.integers(1, 1 << 26),
    layers=st.integers(1, 64),
    slot=sizes,
    roomy_slot=st.just(0),
    tail=sizes,
    block=sizes,
    tokens=st.just(100),
    window=st.none() | st.integers(0, 4),
).flatmap(lambda facts: st.integers(0, 1 << 16).map(lambda more: replace(facts, roomy_slot=facts.slot + more)))


def least_budget(facts: KvFacts) -> int | None:
    """What a refusal names; None where there is none."""
    try:
        divide(facts)
    except BudgetTooSmall as error:
        return error.needed
    return None


def spent(facts: KvFacts, plan: KvPlan) -> int:
    return facts.layers * facts.tail + plan.transit + plan.slots * plan.slot + plan.resident


@given(facts_of_any_kind)
def test_what_is_planned_is_the_budget_or_refused_with_the_least_that_works(facts: KvFacts) -> None:
    needed = least_budget(facts)
    if needed is not None:
        least = divide(replace(facts, budget=needed))
        assert (least.slots, least.slot, least.transit) == (1, facts.slot, facts.block)
        with pytest.raises(BudgetTooSmall):
            divide(replace(facts, budget=needed - 1))
        return
    plan = divide(facts)
    assert spent(facts, plan) == facts.budget
    assert plan.slot in (facts.slot, facts.roomy_slot)
    assert plan.transit >= facts.block
    assert plan.transit == facts.block or plan.transit <= 256 << 10
    assert plan.resident >= (facts.window or 0) * facts.layers * facts.block


def test_a_second_slot_comes_before_room_to_grow_and_both_before_blocks() -> None:
    facts = KvFacts(budget=0, layers=2, slot=100, roomy_slot=150, tail=5, block=10, tokens=1)
    fixed = 2 * 5 + 10
    found = [divide(replace(facts, budget=fixed + memory)) for memory in (100, 149, 150, 199, 200, 299, 300, 310)]
    assert [(plan.slots, plan.slot, plan.resident + plan.transit - facts.block) for plan in found] == [
        (1, 100, 0), (1, 100, 49), (1, 150, 0), (1, 150, 49), (2, 100, 0), (2, 100, 99), (2, 150, 0), (2, 150, 10),
    ]  # fmt: skip


def test_a_window_that_does_not_fit_is_refused() -> None:
    facts = KvFacts(budget=900, layers=4, slot=100, roomy_slot=100, tail=10, block=50, tokens=1, window=4)
    with pytest.raises(BudgetTooSmall) as caught:
        divide(facts)
    assert caught.value.needed == 4 * 10 + 50 + 4 * 4 * 50 + 100
    plan = divide(replace(facts, window=3))
    assert plan.resident + plan.transit == 900 - 40 - 200
    assert plan.resident >= 3 * 4 * 50


def test_what_is_missing_below_working_memory() -> None:
    facts = KvFacts(budget=0, layers=3, slot=0, roomy_slot=0, tail=0, block=10, tokens=59)
    plan = KvPlan(slots=1, slot=0, resident=40, window=None, transit=10)
    assert missing_on_disk(facts, plan, 20, lower=0) == 3 * 2 * 10 - 40
    assert missing_on_disk(facts, plan, 20, lower=19) == 1
    assert missing_on_disk(facts, plan, 20, lower=20) == 0


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=6), st.booleans(), st.none() | st.integers(0, 5)
)
def test_the_oldest_block_leaves_and_only_when_one_has_to(
    tier: list[tuple[int, int]], over: bool, window: int | None
) -> None:
    due = [
        layer for layer, (_, count) in enumerate(tier) if (over and count) or (window is not None and count > window)
    ]
    chosen = next_to_spill(tier, over=over, window=window)
    assert (chosen is not None) == bool(due)
    if chosen is not None:
        assert chosen in due
        assert all((tier[chosen][0], chosen) <= (tier[layer][0], layer) for layer in due)


@pytest.mark.parametrize(
    ("token_bytes", "layers", "budget", "tokens"),
    [
        (2048, 48, 1 << 40, 128),  # Qwen3-30B-A3B in bf16: 256 KiB
        (1152, 61, 1 << 40, 128),  # DeepSeek-V3
        (128, 48, 1 << 40, 2048),  # tiny, and much memory
        (128, 48, 48 << 20, 512),  # the same with little
        (1 << 20, 1, 1, 64),
    ],
)
def test_the_length_of_a_block(token_bytes: int, layers: int, budget: int, tokens: int) -> None:
    assert block_length(token_bytes, layers, budget) == tokens
