"""Ctrl-C anywhere in a lease: nobody waits in vain afterwards, and no budget is exceeded."""

import pytest
from support.interrupts import InterruptAt
from support.tiers import Gate, make, take, value_of, wait_until

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
