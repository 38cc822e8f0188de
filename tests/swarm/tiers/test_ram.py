"""The RAM tier with real threads: joins, waiting for room, errors."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from random import Random

import pytest

from moehive.protocol.errors import BudgetTooSmall, StorageError
from moehive.swarm.tiers.ram import RamTier

DEADLINE = 10.0  # seconds; reached only by a test that fails


def lease(tier: RamTier[str, str], key: str, size: int = 10) -> str:
    with tier.lease(key, lambda: f"value {key}", lambda _: size, size_hint=size) as value:
        return value


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("the condition was not reached")


def waiters(tier: RamTier[str, str]) -> int:
    return tier._waiting


class GatedLoad:
    """A load that starts when called and ends when told."""

    def __init__(self, result: str | BaseException) -> None:
        self.started, self.finish, self.calls = threading.Event(), threading.Event(), 0
        self._result = result

    def __call__(self) -> str:
        self.calls += 1
        self.started.set()
        assert self.finish.wait(DEADLINE)
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


def test_a_miss_loads_a_hit_does_not_and_both_are_counted() -> None:
    now = iter([0.0, 0.25, 1.0, 1.5])
    tier = RamTier[str, str](25, group=ord, clock=lambda: next(now))
    assert [lease(tier, key) for key in "aab"] == ["value a", "value a", "value b"]
    stats = tier.stats
    assert (stats.hits, stats.misses, stats.loads, stats.evictions, stats.entries) == (1, 2, 2, 0, 2)
    assert (stats.loaded_bytes, stats.load_seconds, stats.slowest_load, stats.mean_load) == (20, 0.75, 0.5, 0.375)
    assert stats.groups[ord("a")].hit_rate == 0.5
    assert stats.groups[ord("b")].hit_rate == 0
    assert tier.resident_bytes == 20


def test_the_least_recently_used_leaves_and_what_is_in_use_or_pinned_stays() -> None:
    tier = RamTier[str, str](30)
    tier.pin("a")
    with tier.lease("b", lambda: "b", lambda _: 10):
        for key in "acd":
            lease(tier, key)
        assert set(tier.keys()) == {"a", "b", "d"}
        assert not tier.evict("a")
        assert not tier.evict("b")
    assert tier.evict("b")
    tier.unpin("a")
    assert tier.evict("a")
    assert tier.keys() == ["d"]


def test_try_lease_takes_only_what_is_there() -> None:
    tier = RamTier[str, str](10)
    assert tier.try_lease("a") is None
    lease(tier, "a")
    resident = tier.try_lease("a")
    assert resident is not None
    with resident as value:
        assert value == "value a"
        assert not tier.evict("a")
    assert tier.evict("a")
    assert tier.stats.misses == 1


def test_many_who_miss_share_one_load_and_its_value() -> None:
    tier, load = RamTier[str, object](10), GatedLoad("shared")
    together = threading.Barrier(4)

    def use() -> object:
        with tier.lease("a", load, lambda _: 10) as value:
            together.wait(DEADLINE)  # all four hold it at once, so nobody's lease ended another's
            assert not tier.evict("a")
            return value

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(use) for _ in range(4)]
        wait_until(lambda: tier.stats.misses == 4)
        load.finish.set()
        values = [result.result(DEADLINE) for result in results]
    assert all(value is values[0] for value in values)
    assert load.calls == 1
    assert (tier.stats.loads, tier.stats.misses, tier.stats.hits) == (1, 4, 0)
    assert tier.evict("a"), "a lease was not given back"


def test_a_failing_load_fails_all_who_joined_and_leaves_no_trace() -> None:
    tier, load = RamTier[str, str](10), GatedLoad(StorageError("the disk is gone"))
    with ThreadPoolExecutor(3) as pool:
        results: list[Future[str]] = [
            pool.submit(lambda: tier.lease("a", load, lambda _: 10, size_hint=10).__enter__()) for _ in range(3)
        ]
        wait_until(lambda: tier.stats.misses == 3)
        load.finish.set()
        errors = [result.exception(DEADLINE) for result in results]
    assert all(error is errors[0] for error in errors)
    assert isinstance(errors[0], StorageError)
    assert (tier.resident_bytes, tier.stats.reserved_bytes, tier.keys(), tier.stats.failed_loads) == (0, 0, [], 1)
    assert lease(tier, "a") == "value a"


def test_who_joined_a_load_that_was_interrupted_loads_for_himself() -> None:
    tier, load = RamTier[str, str](10), GatedLoad(KeyboardInterrupt())
    with ThreadPoolExecutor(2) as pool:
        interrupted = pool.submit(lambda: tier.lease("a", load, lambda _: 10).__enter__())
        assert load.started.wait(DEADLINE)
        joined = pool.submit(lease, tier, "a")
        wait_until(lambda: tier.stats.misses == 2)
        load.finish.set()
        assert joined.result(DEADLINE) == "value a"
        assert isinstance(interrupted.exception(DEADLINE), KeyboardInterrupt)


def test_a_miss_waits_until_room_is_released() -> None:
    tier = RamTier[str, str](10)
    with ThreadPoolExecutor(1) as pool, ExitStack() as holding:
        holding.enter_context(tier.lease("a", lambda: "a", lambda _: 10))
        waiting = pool.submit(lease, tier, "b")
        wait_until(lambda: waiters(tier) == 1)
        assert not waiting.done()
        holding.close()
        assert waiting.result(DEADLINE) == "value b"
    assert tier.keys() == ["b"]


@pytest.mark.parametrize("how", ["failed load", "resize", "unpin"])
def test_everything_that_makes_room_wakes_who_waits(how: str) -> None:
    tier, load = RamTier[str, str](10), GatedLoad(StorageError("no"))
    with ThreadPoolExecutor(2) as pool:
        if how == "failed load":
            first = pool.submit(lambda: tier.lease("a", load, lambda _: 10, size_hint=10).__enter__())
            assert load.started.wait(DEADLINE)
        else:
            lease(tier, "a")
            tier.pin("a")
        waiting = pool.submit(lease, tier, "b")
        wait_until(lambda: waiters(tier) == 1)
        if how == "failed load":
            load.finish.set()
            assert first.exception(DEADLINE) is not None
        elif how == "resize":
            tier.resize(20)
        else:
            tier.unpin("a")
        assert waiting.result(DEADLINE) == "value b"


def test_too_much_in_use_for_too_long_names_the_budget_that_would_do() -> None:
    tier = RamTier[str, str](25, wait=0.01)
    with tier.lease("a", lambda: "a", lambda _: 10), tier.lease("b", lambda: "b", lambda _: 10):
        with pytest.raises(BudgetTooSmall) as caught:
            lease(tier, "c")
        assert (caught.value.budget, caught.value.needed) == (25, 30)
    assert lease(tier, "c") == "value c"


@pytest.mark.parametrize("hint", [11, 5, None])
def test_an_entry_larger_than_the_budget_is_refused_at_once(hint: int | None) -> None:
    tier, calls = RamTier[str, str](10), []
    with pytest.raises(BudgetTooSmall) as caught:
        tier.lease("a", lambda: calls.append("a") or "a", lambda _: 11, size_hint=hint).__enter__()
    assert (caught.value.budget, caught.value.needed) == (10, 11)
    assert len(calls) == (hint != 11), "with a right hint nothing is loaded in vain"
    assert (tier.resident_bytes, tier.stats.reserved_bytes) == (0, 0)


@pytest.mark.parametrize("hint", [0, 3, 10, None])
def test_a_wrong_hint_is_corrected(hint: int | None) -> None:
    tier = RamTier[str, str](10)
    with tier.lease("a", lambda: "a", lambda _: 7, size_hint=hint):
        assert (tier.resident_bytes, tier.stats.reserved_bytes) == (7, 0)


def test_real_threads_stay_within_the_budget() -> None:
    budget, alive, peak, lock = 40, 0, 0, threading.Lock()
    tier = RamTier[int, "Block"](budget)

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

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(400):
            key = random.randrange(12)
            with tier.lease(key, lambda key=key: Block(key), lambda block: block.size, size_hint=5 + key % 6) as block:
                assert block.key == key
                del block  # a reference beyond the lease would be memory that nobody counts

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result(DEADLINE)
    stats = tier.stats
    assert peak <= budget
    assert stats.hits + stats.misses == 1600
    assert stats.resident_bytes == alive
    assert stats.reserved_bytes == 0
    assert stats.evictions == stats.loads - stats.entries
