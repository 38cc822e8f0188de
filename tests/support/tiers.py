"""Memory tiers of strings for tests, and loads that a test begins and ends."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier

DEADLINE = 60.0  # seconds; reached only by a test that fails


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


def joined(tier: RamTier[str, str], key: str) -> int:
    flight = tier._flights.get(key)
    return 0 if flight is None else len(flight.users)


def take_while_it_loads(tier: RamTier[str, str], load: Gate, key: str) -> str:
    """What somebody gets who asks for `key` while `load` is on its way with it."""
    assert load.started.wait(DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, tier, key)
        wait_until(lambda: joined(tier, key) == 1)
        load.finish.set()
        return waiting.result(DEADLINE)
