"""A tier on a machine whose memory runs out."""

import weakref
from collections.abc import Callable
from typing import TypeAlias

import pytest
from support.tiers import Gate, make, take, value_of

from moehive.protocol.errors import MemoryExhausted, StorageError
from moehive.swarm.tiers.ram import RamTier

LoadOf: TypeAlias = Callable[[str], str]

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


def failing_once(tier_of: Callable[[], RamTier[str, str]], then: Callable[[RamTier[str, str]], None]) -> LoadOf:
    """A load that runs out of memory the first time that it is to load "d", after `then`."""
    failures = [True]

    def load(key: str) -> str:
        if key == "d" and failures:
            failures.clear()
            then(tier_of())
            raise MemoryError
        return value_of(key)

    return load


def test_a_budget_does_not_shrink_below_what_is_in_use_and_promised() -> None:
    tier = make(100, failing_once(lambda: tier, lambda _: None))
    with tier.lease("a"), tier.lease("b"):
        assert take(tier, "d") == "value d"
        assert tier.resident_bytes == tier.budget_bytes == 30
    assert tier.excess_bytes == 0


def test_a_budget_that_was_lowered_meanwhile_does_not_grow_by_shrinking() -> None:
    tier = make(100, failing_once(lambda: tier, lambda one: one.resize(15)))
    with tier.lease("a"), tier.lease("b"):
        assert take(tier, "d") == "value d"
        assert (tier.budget_bytes, tier.excess_bytes) == (15, 5)
    assert tier.resident_bytes <= 15


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


def test_who_keeps_an_error_keeps_nothing_of_what_was_half_loaded() -> None:
    """As those do who joined the load, and a notebook. Nobody counts that memory."""
    halves = []

    class Half:
        pass

    def load(_: str) -> str:
        half = Half()
        halves.append(weakref.ref(half))
        raise StorageError("a bad sector")

    with pytest.raises(StorageError) as caught:
        take(make(10, load), "a")
    assert halves[0]() is None
    assert str(caught.value) == "a bad sector"


def test_memory_that_stays_exhausted_is_an_error_that_says_so() -> None:
    def load(_: str) -> str:
        raise MemoryError

    tier = make(100, load)
    with pytest.raises(MemoryExhausted, match="no memory for 10 B,"):
        take(tier, "a")
    assert (tier.resident_bytes, tier.stats.reserved_bytes) == (0, 0)
