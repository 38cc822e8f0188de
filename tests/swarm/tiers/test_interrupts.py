"""Ctrl-C anywhere in a lease: nobody waits in vain afterwards, and no budget is exceeded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.interrupts import InterruptAt
from support.tiers import DEADLINE, Gate, make, take, value_of, wait_until

from moehive.swarm.tiers import leases, loading, ram, residency

FILES = {str(module.__file__) for module in (leases, loading, ram, residency)}


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
