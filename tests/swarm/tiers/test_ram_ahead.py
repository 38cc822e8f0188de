"""Loads of a tier on suspicion: foreseen, late, too many, of no use any more."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
from support.tiers import DEADLINE, Gate, call, joined, make, take, uses, wait_until

from moehive.swarm.tiers.ram import RamTier

# --- loads on suspicion -----------------------------------------------------------------------------------------------


@contextmanager
def prefetched(tier: RamTier[str, str], keys: str) -> Iterator[None]:
    tier.prefetch(0, [(key, 1.0) for key in keys], most=len(keys))
    wait_until(lambda: not tier._flights)
    yield


def test_a_use_that_was_foreseen_hits_and_is_told_apart() -> None:
    tier = make(40, loaders=1)
    with prefetched(tier, "ab"):
        take(tier, "a")
    counts, speculation = tier.stats.total, tier.stats.speculation
    assert (counts.hits, counts.misses, counts.saved, counts.late) == (1, 0, 1, 0)
    assert (speculation.loads, speculation.bytes, speculation.used, speculation.used_bytes) == (2, 20, 1, 10)
    tier.evict("b")
    speculation = tier.stats.speculation
    assert (speculation.wasted, speculation.wasted_bytes, speculation.wasted_share) == (1, 10, 0.5)
    assert [(outcome.rank, outcome.used) for outcome in tier.outcomes()] == [(0, True), (1, False)]
    assert tier.outcomes() == []


def test_a_use_that_joins_a_suspicion_is_late_and_only_partly_hidden() -> None:
    load, now = Gate("a"), [0.0]
    tier = make(40, load, loaders=1, clock=lambda: now[0])
    tier.prefetch(0, [("a", 1.0)], most=1)
    assert load.started.wait(DEADLINE)
    now[0] = 3.0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, tier, "a")
        wait_until(lambda: joined(tier, "a") == 1)
        now[0] = 5.0
        load.finish.set()
        assert waiting.result(DEADLINE) == "value a"
    assert (tier.stats.total.late, tier.stats.total.saved, tier.stats.speculation.used) == (1, 0, 1)
    [outcome] = tier.outcomes()
    assert (outcome.used, outcome.seconds, outcome.hidden) == (True, 5.0, 3.0)
    assert tier.stalled_seconds == tier.stats.total.stalls.total == 2.0


def test_a_use_that_was_foreseen_in_time_hides_the_whole_load() -> None:
    now = count()
    tier = make(40, loaders=1, clock=lambda: float(next(now)))
    with prefetched(tier, "a"):
        take(tier, "a")
    assert tier.stats.speculation.hidden_seconds == tier.load_seconds == 1.0
    assert tier.stalled_seconds == 0.0


def test_the_time_that_a_load_takes_follows_the_latest_ones_slowly() -> None:
    now = iter([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0])  # for each: waits, begins, has loaded, has waited
    tier = make(40, clock=lambda: next(now))
    call(tier, "ab")
    assert tier.load_seconds == pytest.approx(1.0 + 0.1 * (2.0 - 1.0))


def test_suspicions_take_no_more_than_allowed_and_nothing_twice() -> None:
    load = Gate("")
    tier = make(40, load, loaders=1)
    take(tier, "a")
    assert tier.prefetch(0, [("a", 1.0), ("b", 0.9), ("c", 0.8)], most=1) == 1
    wait_until(lambda: not tier._flights)
    assert load.calls == ["a", "b"]


def test_suspicions_evict_nothing_that_is_in_use_or_expected() -> None:
    tier = make(30, loaders=1)
    for key in "abc":
        take(tier, key)
    with tier.lease("a"):
        assert tier.prefetch(0, [("b", 1.0), ("c", 1.0), ("d", 1.0)], most=3) == 0


def test_what_no_longer_helps_is_not_begun() -> None:
    load = Gate("a")
    tier = make(60, load, loaders=1)
    tier.prefetch(0, [("a", 1.0), ("b", 0.9)], most=2)
    assert load.started.wait(DEADLINE)
    call(tier, "c")  # the call they were meant for came, without them
    load.finish.set()
    wait_until(lambda: not tier._flights)
    assert "b" not in load.calls
    assert (tier.stats.speculation.cancelled, tier.stats.speculation.loads, tier.stats.reserved_bytes) == (1, 1, 0)


def test_what_helps_another_layer_is_begun_all_the_same() -> None:
    load = Gate("a")
    tier = make(60, load, loaders=1)
    tier.prefetch(1, [("a", 1.0), ("b", 0.9)], most=2)
    assert load.started.wait(DEADLINE)
    call(tier, "c")  # of layer 0
    load.finish.set()
    wait_until(lambda: not tier._flights)
    assert "b" in load.calls
    assert tier.stats.speculation.cancelled == 0


def test_the_room_of_what_is_not_begun_goes_to_who_waits_for_it() -> None:
    load = Gate("a")
    tier = make(30, load, loaders=1)
    take(tier, "c")
    tier.prefetch(0, [("a", 1.0), ("b", 0.9)], most=2)
    assert load.started.wait(DEADLINE)
    with ThreadPoolExecutor(1) as pool, tier.lease("c"):
        waiting = pool.submit(lambda: tier.lease("d").__enter__())
        wait_until(lambda: len(tier._claims) == 1)
        tier.note(uses("ce"))  # without b
        assert all(claim.granted for claim in tier._claims)
        load.finish.set()
        assert waiting.result(DEADLINE) == "value d"
    assert "b" not in load.calls
