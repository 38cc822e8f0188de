"""A tier with real threads: joins, loads ahead, waiting for room, running out of memory."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.errors import BudgetTooSmall, MemoryExhausted, StorageError
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier

DEADLINE = 20.0  # seconds; reached only by a test that fails


def value_of(key: str) -> str:
    return f"value {key}"


def make(
    budget: int,
    load: Callable[[str], str] = value_of,
    *,
    size: int = 10,
    loaders: int = 0,
    wait: float = 60.0,
    clock: Callable[[], float] | None = None,
) -> RamTier[str, str]:
    """A tier of values of `size` bytes; unless a test is about loader threads, without them."""
    clocks = {} if clock is None else {"clock": clock}
    return RamTier(budget, load, room=lambda _: size, size=lambda _: size, loaders=loaders, wait=wait, **clocks)


def take(tier: RamTier[str, str], key: str) -> str:
    """One call that uses one entry."""
    tier.note(uses(key))
    with tier.lease(key) as value:
        return value


def call(tier: RamTier[str, str], keys: str) -> list[str]:
    """One call that uses several, in that order."""
    tier.note(uses(keys))
    found = []
    for key in keys:
        with tier.lease(key) as value:
            found.append(value)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("the condition was not reached")


def uses(keys: str) -> Uses[str]:
    return Uses(0, dict.fromkeys(keys, 1))


class Gate:
    """Loads that start when called and end when told; all others at once."""

    def __init__(self, gated: str, error: BaseException | None = None) -> None:
        self.started, self.finish, self.calls = threading.Event(), threading.Event(), []
        self._gated = gated
        self._error = error

    def __call__(self, key: str) -> str:
        self.calls.append(key)
        if key in self._gated:
            self.started.set()
            assert self.finish.wait(DEADLINE)
            if self._error is not None:
                error, self._error = self._error, None
                raise error
        return value_of(key)


# --- one entry --------------------------------------------------------------------------------------------------------


def test_a_miss_loads_a_hit_does_not_and_both_are_counted() -> None:
    now = iter([0.0, 0.0, 0.25, 0.25, 1.0, 1.0, 1.5, 2.0])
    tier = make(25, clock=lambda: next(now))
    assert [take(tier, key) for key in "aab"] == ["value a", "value a", "value b"]
    stats, counts = tier.stats, tier.stats.total
    assert (counts.hits, counts.misses, counts.steps, counts.clean_steps) == (1, 2, 3, 1)
    assert (counts.loads.count, counts.loads.total, counts.loads.slowest) == (2, 0.75, 0.5)
    assert (counts.stalls.count, counts.stalls.total) == (2, 1.25)
    assert (stats.loaded_bytes, stats.evictions, stats.entries, stats.hit_rate) == (20, 0, 2, pytest.approx(1 / 3))
    assert tier.resident_bytes == 20


def test_what_is_in_use_or_pinned_stays() -> None:
    tier = make(30)
    tier.pin("a")
    with tier.lease("b"):
        for key in "acd":
            take(tier, key)
        assert set(tier.keys()) == {"a", "b", "d"}
        assert not tier.evict("a")
        assert not tier.evict("b")
    assert tier.evict("b")
    tier.unpin("a")
    assert tier.evict("a")
    assert tier.keys() == ["d"]


def test_many_who_miss_share_one_load_and_its_value() -> None:
    load = Gate("a")
    tier = make(10, load)
    together = threading.Barrier(4)

    def use() -> object:
        with tier.lease("a") as value:
            together.wait(DEADLINE)  # all four hold it at once, so nobody's lease ended another's
            assert not tier.evict("a")
            return value

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(use) for _ in range(4)]
        wait_until(lambda: joined(tier, "a") == 4)
        load.finish.set()
        values = [result.result(DEADLINE) for result in results]
    assert all(value is values[0] for value in values)
    assert load.calls == ["a"]
    assert tier.evict("a"), "a lease was not given back"


def test_a_failing_load_fails_all_who_joined_and_leaves_no_trace() -> None:
    load = Gate("a", StorageError("the disk is gone"))
    tier = make(10, load)
    with ThreadPoolExecutor(3) as pool:
        results: list[Future[str]] = [pool.submit(take, tier, "a") for _ in range(3)]
        wait_until(lambda: tier.stats.total.misses == 3 and joined(tier, "a") == 3)
        load.finish.set()
        errors = [result.exception(DEADLINE) for result in results]
    assert all(error is errors[0] for error in errors)
    assert isinstance(errors[0], StorageError)
    assert (tier.resident_bytes, tier.stats.reserved_bytes, tier.keys(), tier.stats.failed_loads) == (0, 0, [], 1)
    assert take(tier, "a") == "value a"


def joined(tier: RamTier[str, str], key: str) -> int:
    flight = tier._flights.get(key)
    return 0 if flight is None else flight.users


def test_who_joined_a_load_that_was_interrupted_loads_for_himself() -> None:
    load = Gate("a", KeyboardInterrupt())
    tier = make(10, load)
    with ThreadPoolExecutor(2) as pool:
        interrupted = pool.submit(take, tier, "a")
        assert load.started.wait(DEADLINE)
        other = pool.submit(take, tier, "a")
        wait_until(lambda: joined(tier, "a") == 2)
        load.finish.set()
        assert other.result(DEADLINE) == "value a"
        assert isinstance(interrupted.exception(DEADLINE), KeyboardInterrupt)


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_miss_waits_until_room_is_released() -> None:
    tier = make(10)
    with ThreadPoolExecutor(1) as pool, ExitStack() as holding:
        holding.enter_context(tier.lease("a"))
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: tier._waiting == 1)
        assert not waiting.done()
        holding.close()
        assert waiting.result(DEADLINE) == "value b"
    assert tier.keys() == ["b"]


@pytest.mark.parametrize("how", ["failed load", "resize", "unpin"])
def test_everything_that_makes_room_wakes_who_waits(how: str) -> None:
    load = Gate("a" if how == "failed load" else "", StorageError("no"))
    tier = make(10, load)
    with ThreadPoolExecutor(2) as pool:
        if how == "failed load":
            first = pool.submit(take, tier, "a")
            assert load.started.wait(DEADLINE)
        else:
            take(tier, "a")
            tier.pin("a")
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: tier._waiting == 1)
        if how == "failed load":
            load.finish.set()
            assert first.exception(DEADLINE) is not None
        elif how == "resize":
            tier.resize(20)
        else:
            tier.unpin("a")
        assert waiting.result(DEADLINE) == "value b"


def test_too_much_in_use_for_too_long_names_the_budget_that_would_do() -> None:
    tier = make(25, wait=0.01)
    with tier.lease("a"), tier.lease("b"):
        with pytest.raises(BudgetTooSmall) as caught:
            take(tier, "c")
        assert (caught.value.budget, caught.value.needed) == (25, 30)
    assert take(tier, "c") == "value c"


def test_an_entry_larger_than_the_budget_is_refused_at_once() -> None:
    load = Gate("")
    tier = make(9, load)
    with pytest.raises(BudgetTooSmall) as caught:
        take(tier, "a")
    assert (caught.value.budget, caught.value.needed) == (9, 10)
    assert load.calls == [], "nothing is loaded in vain"
    assert (tier.resident_bytes, tier.stats.reserved_bytes) == (0, 0)


def test_loading_may_take_more_room_than_the_value() -> None:
    tier = RamTier[str, str](25, value_of, room=lambda _: 15, size=lambda _: 10, loaders=0)
    assert [take(tier, key) for key in "ab"] == ["value a", "value b"]
    assert (tier.resident_bytes, tier.stats.reserved_bytes, tier.stats.evictions) == (20, 0, 0)
    take(tier, "c")
    assert tier.keys() == ["b", "c"]


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


def test_what_somebody_else_loaded_is_kept_where_there_is_room() -> None:
    load = Gate("")
    tier = make(20, load)
    assert tier.put("a", "another a", 0.5)
    assert tier.put("a", "a third a", 0.5)
    assert leased(tier, "a") == "another a"
    lease = tier.try_lease("a")
    assert lease is not None
    with lease as value, tier.lease("b"):
        assert value == "another a"
        assert not tier.put("c", "c", 0.5), "all is in use"
    assert tier.put("c", "c", 0.5)
    assert tier.try_lease("d") is None
    assert load.calls == ["b"]


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
    assert load.started.wait(DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, tier, "a")
        wait_until(lambda: joined(tier, "a") == 1)
        load.finish.set()
        assert waiting.result(DEADLINE) == "value a"
    assert take(tier, "a") == "value a"
    assert tier.stats.failed_loads == 1
    assert load.calls == ["a", "a"]


def test_an_error_of_a_load_ahead_is_told_to_who_needs_the_entry() -> None:
    """It may say more than a second try would: a file that was found corrupt is gone by then."""
    errors = [StorageError("corrupt")]

    def load(key: str) -> str:
        if key == "b" and errors:
            raise errors.pop()
        return value_of(key)

    tier = make(40, load, loaders=1)
    tier.note(uses("ab"))
    wait_until(lambda: not errors and not tier._flights)
    assert leased(tier, "a") == "value a"
    with pytest.raises(StorageError, match="corrupt"):
        leased(tier, "b")
    assert leased(tier, "b") == "value b"


def test_a_closed_tier_loads_without_threads() -> None:
    tier = make(40, loaders=2)
    call(tier, "ab")
    tier.close()
    tier.close()
    assert tier.prefetch(0, [("c", 1.0)], most=1) == 0
    assert call(tier, "cd") == ["value c", "value d"]


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
    load = Gate("a")
    tier = make(40, load, loaders=1)
    tier.prefetch(0, [("a", 1.0)], most=1)
    assert load.started.wait(DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, tier, "a")
        wait_until(lambda: joined(tier, "a") == 1)
        load.finish.set()
        assert waiting.result(DEADLINE) == "value a"
    assert (tier.stats.total.late, tier.stats.total.saved, tier.stats.speculation.used) == (1, 0, 1)
    [outcome] = tier.outcomes()
    assert outcome.used
    assert outcome.hidden <= outcome.seconds


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


# --- running out of memory --------------------------------------------------------------------------------------------


def test_where_memory_runs_out_the_budget_shrinks_and_the_load_is_tried_again() -> None:
    failures = iter([False, False, False, True, False, False])

    def load(key: str) -> str:
        if next(failures):
            raise MemoryError
        return value_of(key)

    tier = make(100, load)
    for key in "abc":
        take(tier, key)
    assert take(tier, "d") == "value d"
    assert (tier.budget_bytes, tier.resident_bytes, tier.stats.shrinks) == (30, 30, 1)
    take(tier, "e")
    assert tier.resident_bytes == 30


def test_only_what_says_so_is_taken_for_exhausted_memory() -> None:
    """What torch raises is told by the caller; anything else is not tried again."""
    load = Gate("")
    errors: list[Exception] = [RuntimeError("no memory"), RuntimeError("a bug")]

    def failing(key: str) -> str:
        if errors:
            raise errors.pop(0)
        return load(key)

    tier = RamTier[str, str](
        100, failing, room=lambda _: 10, size=lambda _: 10, loaders=0, out_of_memory=lambda e: "memory" in str(e)
    )
    with pytest.raises(RuntimeError, match="a bug"):
        take(tier, "a")
    assert tier.stats.shrinks == 1
    tier.resize(20)
    assert take(tier, "a") == "value a"


def test_free_buffers_are_given_up_where_the_budget_shrinks() -> None:
    freed: list[int] = []
    failures = iter([True, False, False])

    def load(key: str) -> str:
        if next(failures):
            raise MemoryError
        return key

    tier = RamTier[str, str](
        100, load, room=lambda _: 10, size=lambda _: 10, loaders=0, freed=lambda: freed.append(tier.resident_bytes)
    )
    take(tier, "a")
    assert freed == [0]
    tier.evict("a")
    tier.resize(50)
    assert freed == [0, 0, 0]


def test_memory_that_stays_exhausted_is_an_error_that_says_so() -> None:
    def load(_: str) -> str:
        raise MemoryError

    tier = make(100, load)
    with pytest.raises(MemoryExhausted, match="no memory for 10 bytes"):
        take(tier, "a")
    assert (tier.resident_bytes, tier.stats.reserved_bytes) == (0, 0)


# --- a call in one step -------------------------------------------------------------------------------------------


def held(tier: RamTier[str, str], keys: str) -> list[str]:
    """As `call`, in one step as far as the entries are resident."""
    with tier.hold(uses(keys)) as entries:
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
        assert all(entry.in_use == 0 for entry in one._residency.entries.values())
    if roomy:
        assert one.stats.meter == many.stats.meter


def test_what_a_call_holds_stays_until_it_is_left_and_then_makes_room() -> None:
    tier = make(20, loaders=0, wait=DEADLINE)
    call(tier, "ab")
    with ThreadPoolExecutor(1) as pool:
        with tier.hold(uses("ab")):
            assert not tier.evict("a")
            waiting = pool.submit(take, tier, "c")
            wait_until(lambda: tier._waiting > 0)
            assert not waiting.done()
        assert waiting.result(DEADLINE) == "value c"


def test_a_budget_lowered_while_a_call_holds_is_kept_from_its_end_on() -> None:
    tier = make(20)
    call(tier, "ab")
    with tier.hold(uses("ab")):
        tier.resize(10)
        assert tier.resident_bytes == 20
    assert tier.resident_bytes == 10


# --- everything at once -----------------------------------------------------------------------------------------------


def test_real_threads_stay_within_the_budget() -> None:
    budget, alive, peak, lock = 60, 0, 0, threading.Lock()

    class Block:
        """Counts the bytes that are really alive, from the load to the moment the last reference goes."""

        def __init__(self, key: int) -> None:
            nonlocal alive, peak
            self.key, self.size = key, 5 + key % 6
            with lock:
                alive += self.size
                peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= self.size

    tier = RamTier[int, Block](budget, Block, room=lambda key: 5 + key % 6, size=lambda block: block.size)

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(200):
            keys = random.sample(range(12), 2)
            tier.prefetch(0, [(random.randrange(12), 0.5)], most=1)
            tier.note(Uses(0, dict.fromkeys(keys, 1)))
            for key in keys:
                with tier.lease(key) as block:
                    assert block.key == key
                    del block  # a reference beyond its turn would be memory that nobody counts

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(2 * DEADLINE)
    wait_until(lambda: not tier._flights)
    stats, counts = tier.stats, tier.stats.total
    assert peak <= budget
    assert counts.hits + counts.misses == 1600
    assert stats.resident_bytes == alive
    assert stats.reserved_bytes == 0
    assert stats.evictions == counts.loads.count - stats.entries
    assert stats.speculation.pending == sum(e.speculation is not None for e in tier._residency.entries.values())


def test_a_hold_keeps_what_is_resident_and_counts_as_note_does() -> None:
    tier = make(20)
    with tier.hold(uses("ab")) as held:
        assert list(held) == [None, None]
    call(tier, "ab")
    before = tier.stats.total
    with tier.hold(uses("ab")) as held:
        assert [entry.value for entry in held if entry is not None] == ["value a", "value b"]
        assert not tier.evict("a")
        tier.resize(10)
        assert tier.resident_bytes == 20, "what is in use stays"
    after = tier.stats.total
    assert tier.resident_bytes == 10, "the lowered budget holds from the release on"
    assert (after.hits - before.hits, after.clean_steps - before.clean_steps) == (2, 1)
    with tier.hold(uses("ab")) as held:
        assert sum(entry is None for entry in held) == 1
