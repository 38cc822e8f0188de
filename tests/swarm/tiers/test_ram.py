"""A tier with real threads: joins, waiting for room, everything at once."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from random import Random

import pytest
from support.tiers import DEADLINE, Gate, joined, make, take, value_of, wait_until

from moehive.protocol.errors import BudgetTooSmall, StorageError
from moehive.swarm.tiers import loading
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier

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


@pytest.mark.parametrize("ended", [False, True])
def test_who_is_interrupted_while_he_waits_for_a_load_uses_it_no_more(ended: bool) -> None:
    """Ctrl-C in a notebook: what nobody uses can be evicted, else the budget would be smaller from then on."""
    load = Gate("a")
    tier = make(10, load)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if ended:
                load.finish.set()
                super().wait(DEADLINE)
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(take, tier, "a")
        assert load.started.wait(DEADLINE)
        tier._flights["a"].done = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            take(tier, "a")
        load.finish.set()
        assert loading.result(DEADLINE) == "value a"
    assert tier.evict("a")


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_miss_waits_until_room_is_released() -> None:
    tier = make(10)
    with ThreadPoolExecutor(1) as pool, ExitStack() as holding:
        holding.enter_context(tier.lease("a"))
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: len(tier._claims) == 1)
        assert not waiting.done()
        holding.close()
        assert waiting.result(DEADLINE) == "value b"
    assert tier.keys() == ["b"]


def test_room_goes_to_who_waits_longest_not_to_who_is_there_first() -> None:
    """Who releases one entry and needs the next is always there first: in a budget for one, others would starve."""
    load = Gate("")
    tier = make(10, load)
    with ThreadPoolExecutor(2) as pool:
        with tier.lease("a"):
            waiting = []
            for key in "bc":
                waiting.append(pool.submit(take, tier, key))
                wait_until(lambda: len(tier._claims) == len(waiting))
        assert take(tier, "d") == "value d"
        assert [done.result(DEADLINE) for done in waiting] == ["value b", "value c"]
    assert load.calls == ["a", "b", "c", "d"]


def by_length(budget: int) -> RamTier[str, str]:
    """Of entries whose loads take as many bytes as their keys have letters."""
    return RamTier[str, str](budget, value_of, room=len, size=lambda _: 1, loaders=1, wait=10 * DEADLINE)


def test_who_needs_more_than_is_released_is_not_passed_for_ever() -> None:
    """Of three threads with an entry each, always two use theirs: what one of them releases is never enough."""
    tier = by_length(3)
    turns = [threading.Semaphore(0) for _ in range(3)]
    steps: SimpleQueue[int] = SimpleQueue()

    def use(number: int) -> None:
        for turn in range(3):
            with tier.lease("abc"[number] if turn % 2 else "def"[number]):
                steps.put(number)
                assert turns[number].acquire(timeout=DEADLINE)

    with ThreadPoolExecutor(4) as pool:
        small = [pool.submit(use, number) for number in range(3)]
        for _ in small:
            steps.get(timeout=DEADLINE)
        large = pool.submit(take, tier, "xx")
        wait_until(lambda: len(tier._claims) == 1)
        turns[0].release()
        wait_until(lambda: len(tier._claims) == 2 or not steps.empty())
        assert steps.empty(), "whoever came later was served first"
        assert tier.begin(0, "g") == []
        assert tier.prefetch(0, [("g", 1.0)], most=1) == 0
        turns[1].release()
        assert large.result(DEADLINE) == "value xx"
        for turn in turns:
            turn.release(3)
        for done in small:
            done.result(DEADLINE)


@pytest.mark.parametrize("borrows", [False, True])
def test_who_waits_for_much_holds_up_nobody_that_has_in_use_what_it_waits_for(borrows: bool) -> None:
    tier = by_length(2)
    with ThreadPoolExecutor(2) as pool, ExitStack() as held:
        held.enter_context(tier.borrow(1, "a test") if borrows else tier.lease("a"))
        large = pool.submit(take, tier, "xx")
        wait_until(lambda: len(tier._claims) == 1)
        held.enter_context(tier.lease("b"))
        assert not large.done()
        held.close()
        assert large.result(DEADLINE) == "value xx"


def test_nor_anybody_for_whom_such_a_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LOOK", 10 * DEADLINE)
    tier = by_length(2)
    with ThreadPoolExecutor(3) as pool, ExitStack() as held:
        held.enter_context(tier.lease("a"))
        large = pool.submit(take, tier, "xx")
        wait_until(lambda: len(tier._claims) == 1)
        other = pool.submit(take, tier, "b")
        wait_until(lambda: len(tier._claims) == 2)
        held.enter_context(tier.lease("b"))  # joins the other's load
        assert other.result(DEADLINE) == "value b"
        assert not large.done()
        held.close()
        assert large.result(DEADLINE) == "value xx"


@pytest.mark.parametrize("room_came", [False, True])
def test_who_is_interrupted_while_he_waits_for_room_leaves_it_to_others(
    room_came: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make(10)

    def interrupted(left: float) -> None:
        if room_came:
            tier._residency.resize(20)
            tier._notify()
        raise KeyboardInterrupt

    with tier.lease("a"), monkeypatch.context() as patched:
        patched.setattr(tier._room, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(tier, "b")
    assert (tier._claims, tier._flights, tier.stats.reserved_bytes) == ([], {}, 0)
    assert take(tier, "b") == "value b"


@pytest.mark.parametrize("how", ["failed load", "resize", "unpin", "borrow"])
def test_everything_that_makes_room_wakes_who_waits(how: str) -> None:
    load = Gate("a" if how == "failed load" else "", StorageError("no"))
    tier = make(10, load)
    with ThreadPoolExecutor(2) as pool, ExitStack() as borrowed:
        if how == "failed load":
            first = pool.submit(take, tier, "a")
            assert load.started.wait(DEADLINE)
        elif how == "borrow":
            borrowed.enter_context(tier.borrow(5, "a test"))
        else:
            take(tier, "a")
            tier.pin("a")
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: len(tier._claims) == 1)
        if how == "failed load":
            load.finish.set()
            assert first.exception(DEADLINE) is not None
        elif how == "borrow":
            borrowed.close()
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
