"""Calls of several entries: what is absent loads meanwhile, one after the other, or held in one step."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiers import DEADLINE, Gate, call, make, take, take_while_it_loads, uses, value_of, wait_until

from moehive.protocol.errors import StorageError
from moehive.swarm.tiers import loading
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.residency import Entry

# --- calls of several entries -----------------------------------------------------------------------------------------


def test_what_is_absent_loads_while_the_rest_is_used() -> None:
    load = Gate("ab")
    tier = make(40, load, loaders=2)
    take(tier, "c")
    assert tier.note(uses("abc")) == ["a", "b"]
    wait_until(lambda: sorted(load.calls) == ["a", "b", "c"])
    with tier.lease("c") as value:
        assert value == "value c"
    load.finish.set()
    assert [leased(tier, key) for key in "ab"] == ["value a", "value b"]
    counts = tier.stats.total
    assert (counts.hits, counts.misses, counts.steps, counts.clean_steps) == (1, 3, 2, 0)
    assert sorted(load.calls) == ["a", "b", "c"]


def leased(tier: RamTier[str, str], key: str) -> str:
    with tier.lease(key) as value:
        return value


def test_where_nothing_is_resident_the_caller_loads_the_first_itself() -> None:
    load = Gate("b")
    tier = make(40, load, loaders=1)
    assert tier.note(uses("ab")) == ["a", "b"]
    assert load.started.wait(DEADLINE)
    assert leased(tier, "a") == "value a"
    load.finish.set()
    assert leased(tier, "b") == "value b"


def test_what_a_call_wants_is_spared_and_what_it_takes_last_leaves_first() -> None:
    tier = make(30)
    for key in "axb":
        take(tier, key)
    call(tier, "abc")
    assert sorted(tier.keys()) == ["a", "b", "c"]
    assert call(tier, "dabc") == [value_of(key) for key in "dabc"]  # more than fits: the order of use decides
    counts = tier.stats.total
    assert (counts.hits, counts.misses) == (2 + 3, 3 + 1 + 1)
    assert counts.loads.count == 6, "c had to make way for d, and came back"


@pytest.mark.parametrize("budget", [10, 20, 30])
def test_a_call_of_more_than_fits_is_served_one_after_the_other(budget: int) -> None:
    tier = make(budget, loaders=2)
    for _ in range(3):
        assert call(tier, "abcdefgh") == [value_of(key) for key in "abcdefgh"]
    assert tier.resident_bytes <= budget


def test_a_call_that_is_abandoned_spares_nothing_beyond_the_next() -> None:
    tier = make(30)
    for key in "abc":
        take(tier, key)
    tier.note(uses("abd"))  # and never leased
    assert tier._residency._wanted
    tier.note(uses("c"))
    assert not tier._residency._wanted


def test_threads_with_calls_that_do_not_fit_together_do_not_wait_for_each_other() -> None:
    tier = make(20, loaders=2, wait=DEADLINE)

    def work(keys: str) -> None:
        for turn in range(100):
            assert call(tier, keys[turn % 2 :]) == [value_of(key) for key in keys[turn % 2 :]]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, keys) for keys in ("abc", "def", "bcd", "gha")]:
            done.result(2 * DEADLINE)
    wait_until(lambda: not tier._flights)
    assert tier.stats.reserved_bytes == 0


def put(tier: RamTier[str, str], key: str, value: str) -> bool:
    with tier.incoming(key) as room:
        if room is not None:
            tier.put(room, value, 0.5)
        return room is not None


def test_the_room_of_what_somebody_else_loads_is_taken_before_and_given_back_where_it_is_not_used() -> None:
    tier = RamTier[str, str](30, value_of, room=lambda _: 15, size=lambda _: 10, loaders=0, wait=DEADLINE)
    call(tier, "ab")
    with tier.incoming("c") as room:
        assert room is not None
        assert (tier.keys(), tier.stats.reserved_bytes) == (["b"], 15)
        tier.put(room, "another c", 0.5)
        assert (tier.keys(), tier.stats.reserved_bytes, tier.resident_bytes) == (["b", "c"], 0, 20)
    with pytest.raises(StorageError), tier.incoming("d"):
        raise StorageError("the peers are gone")
    assert tier.stats.reserved_bytes == 0
    with tier.incoming("e") as first, tier.incoming("f") as second, tier.incoming("g") as third:
        assert (first is None, second is None, third is None) == (False, False, True)


def test_what_is_put_gives_the_rest_of_its_room_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LOOK", 10 * DEADLINE)
    rooms = {"a": 15, "b": 10, "c": 5}
    tier = RamTier[str, str](20, value_of, room=rooms.__getitem__, size=lambda _: 5, loaders=0, wait=10 * DEADLINE)
    with ThreadPoolExecutor(1) as pool, tier.incoming("a") as room:
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: len(tier._claims) == 1)
        with tier.incoming("c") as none:
            assert none is None, "somebody waits for room"
        assert room is not None
        tier.put(room, "a", 0.5)
        assert waiting.result(DEADLINE) == "value b"


def test_what_somebody_else_loaded_is_kept_where_there_is_room() -> None:
    load = Gate("")
    tier = make(20, load)
    assert put(tier, "a", "another a")
    assert put(tier, "a", "a third a")
    assert leased(tier, "a") == "another a"
    lease = tier.try_lease("a")
    assert lease is not None
    with lease as value, tier.lease("b"):
        assert value == "another a"
        assert not put(tier, "c", "c"), "all is in use"
    assert put(tier, "c", "c")
    assert tier.try_lease("d") is None
    assert load.calls == ["b"]


def test_what_is_on_its_way_is_not_put_beside_itself() -> None:
    load = Gate("a")
    tier = make(20, load)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(take, tier, "a")
        assert load.started.wait(DEADLINE)
        assert put(tier, "a", "another a")
        load.finish.set()
        assert loading.result(DEADLINE) == "value a"
    assert (tier.stats.entries, tier.resident_bytes, tier.stats.reserved_bytes) == (1, 10, 0)


def test_a_load_that_no_thread_has_begun_is_taken_over() -> None:
    """Two loads are queued behind one loader that is held up: the step itself loads what it needs first."""
    load = Gate("z")
    tier = make(60, load, loaders=1)
    assert tier.prefetch(0, [("z", 1.0), ("a", 1.0)], most=2) == 2
    assert load.started.wait(DEADLINE)
    assert take(tier, "a") == "value a"
    load.finish.set()
    assert take(tier, "z") == "value z"
    assert sorted(load.calls) == ["a", "z"]


def test_an_error_of_a_load_on_a_guess_is_nobodys_and_who_waits_tries_again() -> None:
    load = Gate("a", StorageError("no"))
    tier = make(40, load, loaders=1)
    tier.prefetch(0, [("a", 1.0)], most=1)
    assert take_while_it_loads(tier, load, "a") == "value a"
    assert take(tier, "a") == "value a"
    assert tier.stats.failed_loads == 1
    assert load.calls == ["a", "a"]


def with_failed_load_ahead(error: Exception) -> RamTier[str, str]:
    """A call of "a" and "b" was noted, and the first load of "b" has failed."""
    errors = [error]

    def load(key: str) -> str:
        if key == "b" and errors:
            raise errors.pop()
        return value_of(key)

    tier = make(40, load, loaders=1)
    tier.note(uses("ab"))
    wait_until(lambda: not errors and not tier._flights)
    return tier


def test_an_error_of_a_load_ahead_is_told_to_who_needs_the_entry() -> None:
    """It may say more than a second try would: a file that was found corrupt is gone by then."""
    tier = with_failed_load_ahead(StorageError("corrupt"))
    assert leased(tier, "a") == "value a"
    with pytest.raises(StorageError, match="corrupt"):
        leased(tier, "b")
    assert leased(tier, "b") == "value b"


def test_an_error_of_a_load_ahead_that_nobody_asked_for_is_forgotten_at_the_next_call() -> None:
    """It is told to the call that it was loaded for. Later the cause may be gone."""
    tier = with_failed_load_ahead(StorageError("busy"))  # of a call that was abandoned
    assert call(tier, "b") == ["value b"]


def test_no_more_loads_begin_ahead_than_there_are_threads_for_them() -> None:
    """What is queued would have its bytes promised, and keep others from them."""
    load = Gate("abc")
    tier = make(40, load, loaders=2)
    assert tier.begin(0, "abc") == ["a", "b"]
    assert tier.stats.reserved_bytes == 20
    load.finish.set()
    assert [leased(tier, key) for key in "abc"] == ["value a", "value b", "value c"]


def test_a_closed_tier_loads_without_threads() -> None:
    tier = make(40, loaders=2)
    call(tier, "ab")
    tier.close()
    tier.close()
    assert tier.prefetch(0, [("c", 1.0)], most=1) == 0
    assert call(tier, "cd") == ["value c", "value d"]


# --- a call in one step -------------------------------------------------------------------------------------------


@contextmanager
def holding(tier: RamTier[str, str], keys: str) -> Iterator[Sequence[Entry[str, str] | None]]:
    use = tier.hold(0, keys)
    try:
        yield use.entries
    finally:
        tier.release(use)


def held(tier: RamTier[str, str], keys: str) -> list[str]:
    """As `call`, in one step as far as the entries are resident."""
    with holding(tier, keys) as entries:
        assert [entry is None or entry.key == key for entry, key in zip(entries, keys, strict=True)] == [True] * len(
            keys
        )
        found = {entry.key: entry.value for entry in entries if entry is not None}
    for key in keys:
        if key not in found:
            with tier.lease(key) as value:
                found[key] = value
    return [found[key] for key in keys]


CALLS = st.lists(st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3).map(lambda keys: "".join(sorted(keys))))


@given(CALLS, st.booleans())
def test_a_call_in_one_step_counts_and_evicts_as_single_leases_do(calls: list[str], roomy: bool) -> None:
    one, many = (make(60 if roomy else 30, clock=lambda: 0.0) for _ in range(2))
    for keys in calls:
        assert held(one, keys) == call(many, keys) == [value_of(key) for key in keys]
        if roomy:  # else single leases may evict one of the call's own
            assert set(one.keys()) == set(many.keys())
        assert not one._residency.uses
    if roomy:
        assert one.stats.meter == many.stats.meter


def test_what_a_call_holds_stays_until_it_is_left_and_then_makes_room() -> None:
    tier = make(20, loaders=0, wait=DEADLINE)
    call(tier, "ab")
    with ThreadPoolExecutor(1) as pool:
        with holding(tier, "ab"):
            assert not tier.evict("a")
            waiting = pool.submit(take, tier, "c")
            wait_until(lambda: len(tier._claims) > 0)
            assert not waiting.done()
        assert waiting.result(DEADLINE) == "value c"


def test_a_budget_lowered_while_a_call_holds_is_kept_from_its_end_on() -> None:
    tier = make(20)
    call(tier, "ab")
    with holding(tier, "ab"):
        tier.resize(10)
        assert tier.resident_bytes == 20
    assert tier.resident_bytes == 10


def test_a_hold_keeps_what_is_resident_and_counts_as_note_does() -> None:
    tier = make(20)
    with holding(tier, "ab") as held:
        assert list(held) == [None, None]
    call(tier, "ab")
    before = tier.stats.total
    with holding(tier, "ab") as held:
        assert [entry.value for entry in held if entry is not None] == ["value a", "value b"]
        assert not tier.evict("a")
        tier.resize(10)
        assert tier.resident_bytes == 20, "what is in use stays"
    after = tier.stats.total
    assert tier.resident_bytes == 10, "the lowered budget holds from the release on"
    assert (after.hits - before.hits, after.clean_steps - before.clean_steps) == (2, 1)
    with holding(tier, "ab") as held:
        assert sum(entry is None for entry in held) == 1
