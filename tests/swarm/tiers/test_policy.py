from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.tiers.policy import Lru, replay
from moehive.swarm.tiers.ram import RamTier

TRACES = st.lists(st.integers(0, 9), max_size=60)
SIZES = {key: 1 + key % 3 for key in range(10)}


def never(_: int) -> bool:
    return False


def test_the_oldest_leave_first_and_a_hit_makes_young() -> None:
    lru = Lru[int]()
    for key in range(4):
        lru.loaded(key, 10)
    lru.hit(0)
    assert lru.victims(9, 15, never) == [1, 2]
    assert lru.victims(9, 15, lambda key: key == 1) == [2, 3]
    assert lru.victims(9, 40, never) == [1, 2, 3, 0]
    assert lru.victims(9, 41, never) is None
    assert lru.victims(9, 31, lambda key: key == 1) is None
    assert lru.victims(9, 0, never) == []
    lru.evicted(1)
    assert lru.victims(9, 30, never) == [2, 3, 0]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 10))
def test_lru_of_equal_entries_keeps_the_latest_distinct_ones(trace: Sequence[int], slots: int) -> None:
    """Against the definition: a use hits if fewer than `slots` other keys were used since the last use of its key."""
    hits = 0
    for now, key in enumerate(trace):
        before = [i for i in range(now) if trace[i] == key]
        hits += bool(before) and len(set(trace[before[-1] + 1 : now])) < slots
    result = replay(Lru[int](), trace, dict.fromkeys(range(10), 7), 7 * slots)
    assert (result.hits, result.misses) == (hits, len(trace) - hits)


def test_a_walk_over_more_than_fits_hits_nothing() -> None:
    """The trap of caching a layer walk; a later policy must do better, this one is known not to."""
    walk = list(range(10)) * 5
    assert replay(Lru[int](), walk, dict.fromkeys(range(10), 1), 9).hit_rate == 0
    assert replay(Lru[int](), walk, dict.fromkeys(range(10), 1), 10).hit_rate == pytest.approx(0.8)


@given(TRACES, st.integers(3, 20))
def test_a_tier_decides_as_the_replay_of_its_trace(trace: Sequence[int], budget: int) -> None:
    tier = RamTier[int, int](budget)
    for key in trace:
        with tier.lease(key, lambda key=key: key, SIZES.__getitem__, size_hint=SIZES[key]) as value:
            assert value == key
    stats, replayed = tier.stats, replay(Lru[int](), trace, SIZES, budget)
    assert (stats.hits, stats.misses, stats.evictions) == (replayed.hits, replayed.misses, replayed.evictions)
