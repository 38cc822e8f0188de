"""Eviction gives up what is safe to lose, the oldest first, no more than it needs, and nothing else ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ShardHash
from moehive.swarm.policy.eviction import Kept, ObjectFacts, Rank, kept_because, plan_eviction

FACTS = st.builds(
    ObjectFacts,
    hash=st.integers(0, 1 << 64).map(lambda number: ShardHash(f"{number:064x}")),
    size=st.integers(0, 50),
    last_used=st.floats(allow_nan=False),  # clocks jump, also to infinity
    rank=st.sampled_from(Rank),
    pinned=st.booleans(),
    in_use=st.booleans(),
    copies=st.none() | st.integers(0, 3),
)
OBJECTS = st.lists(FACTS, max_size=12, unique_by=lambda facts: facts.hash)


def facts(number: int, size: int = 10, **rest: object) -> ObjectFacts:
    return ObjectFacts(ShardHash(f"{number:064x}"), size, **({"last_used": number, "copies": 1} | rest))  # type: ignore[arg-type]


@given(OBJECTS, st.integers(0, 200), st.booleans())
def test_nothing_goes_that_has_to_stay(objects: list[ObjectFacts], needed: int, force: bool) -> None:
    for victim in plan_eviction(objects, needed, force=force).victims:
        assert not victim.in_use
        assert not victim.pinned
        assert force or victim.rank is Rank.PARTIAL or (victim.copies or 0) > 0


@given(OBJECTS, st.integers(1, 200), st.booleans())
def test_enough_goes_where_there_is_enough_and_no_object_more(
    objects: list[ObjectFacts], needed: int, force: bool
) -> None:
    plan = plan_eviction(objects, needed, force=force)
    assert plan.freed == sum(victim.size for victim in plan.victims)
    safe = sum(one.size for one in objects if kept_because(one, force=force) is None)
    assert plan.freed >= min(needed, safe)
    if plan.freed >= needed:
        assert all(plan.freed - victim.size < needed for victim in plan.victims)


@given(OBJECTS, st.integers(1, 200))
def test_what_stays_though_it_might_go_is_newer_or_of_higher_rank_or_not_needed(
    objects: list[ObjectFacts], needed: int
) -> None:
    plan = plan_eviction(objects, needed)
    victims = set(plan.victims)
    last = max(((one.rank, one.last_used) for one in victims), default=None)
    for one in objects:
        if last is not None and one not in victims and kept_because(one) is None and (one.rank, one.last_used) < last:
            assert plan.freed >= needed  # it was passed over: without it there is enough
            assert one.size <= max(victim.size for victim in victims)


def test_the_order_partial_downloads_then_age_then_foundations() -> None:
    objects = [
        facts(1, rank=Rank.FOUNDATION),
        facts(3),
        facts(2),
        facts(9, rank=Rank.PARTIAL, copies=None),
    ]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 40).victims] == [9, 2, 3, 1]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 11).victims] == [9, 2]


def test_a_large_object_spares_the_small_ones_that_came_before_it() -> None:
    objects = [facts(1, 1), facts(2, 100), facts(3, 1)]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 100).victims] == [2]


def test_the_reasons() -> None:
    assert kept_because(facts(1)) is None
    assert kept_because(facts(1, in_use=True, pinned=True), force=True) is Kept.IN_USE
    assert kept_because(facts(1, pinned=True), force=True) is Kept.PINNED
    assert kept_because(facts(1, copies=0)) is Kept.LAST_COPY
    assert kept_because(facts(1, copies=None)) is Kept.UNKNOWN
    assert kept_because(facts(1, copies=None), force=True) is None
