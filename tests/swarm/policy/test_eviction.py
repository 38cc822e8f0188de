"""Eviction gives up what is safe to lose, the oldest first, no more than it needs, and nothing else ever."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ShardHash
from moehive.swarm.policy.eviction import Kept, ObjectFacts, Rank, kept, plan_eviction

FACTS = st.builds(
    ObjectFacts,
    hash=st.integers(0, 1 << 64).map(lambda number: ShardHash(f"{number:064x}")),
    size=st.integers(0, 50),
    last_used=st.floats(allow_nan=False),  # clocks jump, also to infinity
    rank=st.sampled_from((Rank.PARTIAL, Rank.SHARD, Rank.FOUNDATION)),
    pinned=st.booleans(),
    in_use=st.booleans(),
    copies=st.none() | st.integers(0, 3),
)


@st.composite
def some_objects(draw: st.DrawFn) -> list[ObjectFacts]:
    """Objects, and manifests of some of them."""
    objects = draw(st.lists(FACTS, max_size=12, unique_by=lambda facts: facts.hash))
    owners = [draw(st.sampled_from((None, "a" * 63, "b" * 63))) for _ in objects]
    manifests = [
        replace(
            draw(FACTS),
            hash=ShardHash(f"{owner}0"),
            rank=Rank.MANIFEST,
            dependants=frozenset(one.hash for one, of in zip(objects, owners, strict=True) if of == owner),
        )
        for owner in ("a" * 63, "b" * 63)
    ]
    return objects + manifests[: draw(st.integers(0, 2))]


OBJECTS = some_objects()


def facts(number: int, size: int = 10, **rest: object) -> ObjectFacts:
    return ObjectFacts(ShardHash(f"{number:064x}"), size, **({"last_used": number, "copies": 1} | rest))  # type: ignore[arg-type]


@given(OBJECTS, st.integers(0, 200), st.booleans())
def test_nothing_goes_that_has_to_stay(objects: list[ObjectFacts], needed: int, force: bool) -> None:
    for victim in plan_eviction(objects, needed, force=force).victims:
        assert not victim.in_use
        assert not victim.pinned
        assert force or victim.rank is Rank.PARTIAL or (victim.copies or 0) > 0


@given(OBJECTS, st.integers(0, 200), st.booleans())
def test_a_manifest_goes_only_with_all_that_needs_it(objects: list[ObjectFacts], needed: int, force: bool) -> None:
    victims = plan_eviction(objects, needed, force=force).victims
    for victim in victims:
        assert victim.dependants <= {other.hash for other in victims}


@given(OBJECTS, st.integers(1, 200), st.booleans())
def test_enough_goes_where_there_is_enough_and_no_object_more(
    objects: list[ObjectFacts], needed: int, force: bool
) -> None:
    plan = plan_eviction(objects, needed, force=force)
    assert plan.freed == sum(victim.size for victim in plan.victims)
    stay = kept(objects, force=force)
    assert plan.freed >= min(needed, sum(one.size for one in objects if one.hash not in stay))
    needed_still = frozenset().union(*(victim.dependants for victim in plan.victims))
    if plan.freed >= needed:
        assert all(plan.freed - one.size < needed for one in plan.victims if one.hash not in needed_still)


@given(OBJECTS, st.integers(1, 200))
def test_what_stays_though_it_might_go_is_newer_or_of_higher_rank_or_not_needed(
    objects: list[ObjectFacts], needed: int
) -> None:
    plan = plan_eviction(objects, needed)
    victims, stay = set(plan.victims), kept(objects)
    last = max(((one.rank, one.last_used) for one in victims), default=None)
    for one in objects:
        if last is not None and one not in victims and one.hash not in stay and (one.rank, one.last_used) < last:
            assert plan.freed >= needed  # it was passed over: without it there is enough
            assert one.size <= max(victim.size for victim in victims)


def test_the_order_partial_downloads_then_age_then_foundations() -> None:
    objects = [
        facts(0, rank=Rank.MANIFEST, dependants=frozenset({facts(1).hash, facts(3).hash})),
        facts(1, rank=Rank.FOUNDATION),
        facts(3),
        facts(2),
        facts(9, rank=Rank.PARTIAL, copies=None),
    ]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 50).victims] == [9, 2, 3, 1, 0]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 11).victims] == [9, 2]


def test_a_large_object_spares_the_small_ones_that_came_before_it() -> None:
    objects = [facts(1, 1), facts(2, 100), facts(3, 1)]
    assert [int(one.hash, 16) for one in plan_eviction(objects, 100).victims] == [2]


def test_the_reasons() -> None:
    manifest = facts(2, dependants=frozenset({facts(1).hash}))

    def reason(force: bool = False, **about: object) -> tuple[Kept | None, Kept | None]:
        one = facts(1, **about)
        found = kept([one, manifest], force=force)
        return found.get(one.hash), found.get(manifest.hash)

    assert reason() == (None, None)
    assert reason(True, in_use=True, pinned=True) == (Kept.IN_USE, Kept.NEEDED)
    assert reason(True, pinned=True) == (Kept.PINNED, Kept.NEEDED)
    assert reason(copies=0) == (Kept.LAST_COPY, Kept.NEEDED)
    assert reason(copies=None) == (Kept.UNKNOWN, Kept.NEEDED)
    assert reason(True, copies=None) == (None, None)
