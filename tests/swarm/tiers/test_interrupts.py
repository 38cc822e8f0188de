"""Ctrl-C anywhere in a tier: nobody waits in vain afterwards, no budget is exceeded, and nothing stays in use."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.interrupts import InterruptAt
from support.tiers import DEADLINE, Gate, make, take, value_of, wait_until

from moehive.swarm.tiers import leases, lfru, loading, policy, ram, regression, residency, transitions
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Lru
from moehive.swarm.tiers.ram import RamTier

FILES = {str(module.__file__) for module in (leases, lfru, loading, policy, ram, regression, residency, transitions)}
Tier = RamTier[str, str]


@pytest.mark.parametrize("joins", [False, True])
def test_whoever_comes_after_one_that_was_interrupted_gets_what_it_needs(joins: bool) -> None:
    """An expert that nobody uses may stay counted, where the signal came between two instructions, but no more."""
    for place in range(1, 1000):
        load = Gate("c" if joins else "")
        tier = make(20, load, loaders=1 if joins else 0, wait=0.0)
        for key in "ab":
            take(tier, key)
        if joins:
            tier.evict("a")
            tier.begin(0, "c")
            load.finish.set()
        with InterruptAt(place, FILES) as interrupt:
            take(tier, "c")
        wait_until(lambda tier=tier: not tier._flights)  # type: ignore[misc]
        assert tier.resident_bytes + tier.stats.reserved_bytes <= 20, interrupt.where
        assert take(tier, "c") == value_of("c"), interrupt.where
        tier.close()
        if not interrupt.where:
            return
    pytest.fail("a lease has no end")


@pytest.mark.parametrize("look", [0.01, DEADLINE])
def test_room_is_promised_once_though_who_released_it_was_interrupted(
    look: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before whoever waits was told: that one looks for itself, or is told by the next release."""
    monkeypatch.setattr(loading, "_LOOK", look)
    tier = make(20, wait=DEADLINE)
    tell = tier._room.notify_all

    def interrupted() -> None:
        monkeypatch.setattr(tier._room, "notify_all", tell)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        with tier.lease("b"):
            last = tier.lease("a")
            last.__enter__()
            waiting = pool.submit(take, tier, "c")
            wait_until(lambda: len(tier._claims) == 1)
            monkeypatch.setattr(tier._room, "notify_all", interrupted)
            with pytest.raises(KeyboardInterrupt):
                last.__exit__(None, None, None)
            if look < DEADLINE:
                assert waiting.result(DEADLINE) == value_of("c")
        assert waiting.result(DEADLINE) == value_of("c")
    assert tier.stats.reserved_bytes == 0
    assert not tier._claims


# --- whoever began the call takes back what is left of it -------------------------------------------------------------


def filled(policy: str) -> Tier:
    """A tier with room for four, of which three are there."""
    tier = Tier(
        40, value_of, room=lambda _: 10, size=lambda _: 10, loaders=1, wait=DEADLINE,
        policy=Lru() if policy == "lru" else Lfru(lambda key: (ord(key) % 2, ord(key) // 2), top_k=1),
    )  # fmt: skip
    for key in "abcabc":
        take(tier, key)
    return tier


def hold(tier: Tier, keys: str) -> None:
    use = tier.hold(0, keys)
    try:
        assert use.entries[0] is not None
    finally:
        tier.release(use)


def hold_two(tier: Tier) -> None:
    """Of which one is absent, and leased afterwards."""
    hold(tier, "ay")
    with tier.lease("y") as value:
        assert value == value_of("y")


def lease_two(tier: Tier) -> None:
    with tier.lease("a") as first, tier.lease("b") as second:
        assert (first, second) == (value_of("a"), value_of("b"))


def take_two(tier: Tier) -> None:
    """Of which the second takes the place of something."""
    for key in "xy":
        take(tier, key)


def use_the_rest(tier: Tier) -> None:
    lease = tier.try_lease("a")
    assert lease is not None
    with lease, tier.borrow(5, "a test"):
        tier.prefetch(1, [("y", 0.9)], most=1)
    tier.begin(0, "z")
    tier.resize(20)
    with tier.incoming("w") as room:
        assert room is not None
        tier.put(room, value_of("w"), 0.1)


WORK: list[Callable[[Tier], None]] = [lambda tier: hold(tier, "ab"), hold_two, lease_two, take_two, use_the_rest]


@pytest.mark.parametrize("policy", ["lru", "lfru"])
@pytest.mark.parametrize("work", WORK, ids=["hold", "hold_two", "lease_two", "take_two", "use_the_rest"])
def test_a_call_that_was_interrupted_anywhere_leaves_nothing(work: Callable[[Tier], None], policy: str) -> None:
    for place in range(1, 5000):
        tier = filled(policy)
        with InterruptAt(place, FILES) as interrupt:
            try:
                work(tier)
            except BaseException as error:
                tier.abandon(error)
                raise
        wait_until(lambda tier=tier: not tier._flights)  # type: ignore[misc]
        assert_sound(tier, interrupt.where)
        if not interrupt.where:
            return
    pytest.fail("a call has no end")


def assert_sound(tier: Tier, where: str) -> None:
    """Nothing is in use or promised; what is counted is there, and can all leave and come again."""
    held = tier._residency
    assert (held.uses, tier._claims, tier._borrowed, held.reserved) == (set(), [], [], 0), where
    assert held.resident == sum(held.sizes.values()) == 10 * len(held.entries) <= held.budget, where
    assert held.speculation.pending == sum(entry.speculation is not None for entry in held.entries.values()), where
    assert not held._wanted.keys() - {key for keys in held._noted.values() for key in keys}, where
    tier.resize(0)
    assert (held.resident, held.entries) == (0, {}), where
    if isinstance(held.policy, Lfru):
        assert (held.policy._counts.any(), held.policy._resident.any(), held.policy._entries) == (False, False, {})
    tier.resize(40)
    for key in "abcdef":
        assert take(tier, key) == value_of(key), where
    tier.close()


def test_room_that_is_taken_back_goes_to_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LOOK", 10 * DEADLINE)
    tier = make(10, wait=10 * DEADLINE)
    tier.lease("a").__enter__()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, tier, "b")
        wait_until(lambda: len(tier._claims) == 1)
        tier.abandon(KeyboardInterrupt())
        assert waiting.result(DEADLINE) == value_of("b")


def test_an_error_that_is_kept_keeps_nothing_of_a_tier() -> None:
    """As a notebook keeps the last one: what its frames have is memory that nobody counts."""

    class Value:
        pass

    tier = RamTier[str, Value](10, lambda _: Value(), room=lambda _: 10, size=lambda _: 10, loaders=0)

    def compute() -> None:
        with tier.lease("a") as value:
            assert value
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        compute()
    seen = weakref.ref(tier._residency.entries["a"].value)
    tier.abandon(kept.value)
    assert tier.evict("a")
    assert seen() is None


def test_what_others_have_stays_theirs_when_a_thread_is_interrupted() -> None:
    """Also what the thread has handed over, as the use of an expert that is being uploaded."""
    load = Gate("d")
    tier = make(60, load, loaders=1, wait=DEADLINE)
    for key in "abc":
        take(tier, key)
    with ThreadPoolExecutor(1) as pool, tier.lease("a"):
        theirs, handed_over = pool.submit(tier.hold, 0, "b").result(DEADLINE), tier.try_lease("c")
        assert handed_over is not None
        handed_over.thread = 0
        waiting = pool.submit(take, tier, "d")
        assert load.started.wait(DEADLINE)
        tier.abandon(KeyboardInterrupt())
        assert {entry.key for use in tier._residency.uses for entry in use.entries if entry is not None} == set("bc")
        assert tier.stats.reserved_bytes == 10
        assert [tier.evict(key) for key in "abc"] == [True, False, False]
        load.finish.set()
        assert waiting.result(DEADLINE) == value_of("d")
    tier.release(theirs)
    with handed_over:
        pass
    assert [tier.evict(key) for key in "bcd"] == [True] * 3
    assert tier.stats.reserved_bytes == 0
    tier.close()
