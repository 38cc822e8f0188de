"""Announcements: signed, renewed, changed at once, withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from support.swarm_fakes import MODEL, SECRET, Clock, identity

from moehive.protocol.ids import ExpertKey
from moehive.protocol.inventory import Inventory, decode_inventory, directory_key
from moehive.swarm import announcer as module
from moehive.swarm.announcer import LIFETIME, RENEW_EVERY, Announcer
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

WE = identity(1)
ONE, TWO = ExpertKey(1, 1), ExpertKey(2, 2)


class World:
    """An announcer and the table it writes to."""

    def __init__(self) -> None:
        self.clock = Clock(1_000_000.0)
        self.network = MemoryNetwork(clock=self.clock)
        self.transport = MemoryTransport(self.network, WE)
        self.announcer = Announcer(self.transport, WE, SECRET, MODEL, wall_clock=self.clock)

    def stored(self) -> Inventory | None:
        record = self.network.get(WE.peer, directory_key(SECRET, MODEL)).get(WE.peer)
        return decode_inventory(record.value, now=self.clock.now) if record else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.announcer.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def until_it_holds(self, *held: ExpertKey) -> None:
        async with asyncio.timeout(30):
            while (stored := self.stored()) is None or stored.held != set(held):
                self.clock.now += 1
                await asyncio.sleep(0)


async def test_an_announcement_says_what_is_held_where_and_how_long() -> None:
    world = World()
    world.announcer.hold(frozenset({ONE}), skeleton=True)
    assert await world.announcer.announce()
    stored = world.stored()
    assert stored is not None
    assert (stored.peer, stored.model, stored.held, stored.skeleton) == (WE.peer, MODEL, {ONE}, True)
    assert stored.addresses == tuple(world.transport.addresses)
    assert stored.expires == world.clock.now + LIFETIME


def test_one_lost_renewal_does_not_lose_the_peer() -> None:
    assert LIFETIME > 2 * RENEW_EVERY


async def test_withdrawing_leaves_an_empty_announcement() -> None:
    world = World()
    world.announcer.hold(frozenset({ONE}), skeleton=True)
    await world.announcer.announce()
    world.clock.now += 1
    await world.announcer.withdraw()
    stored = world.stored()
    assert stored is not None
    assert not stored.held
    assert not stored.skeleton


async def test_a_withdrawal_is_for_good() -> None:
    """A thread may find a shard, or lose one, while the node leaves."""
    world = World()
    world.announcer.hold(frozenset({ONE}), skeleton=True)
    await world.announcer.withdraw()
    world.announcer.hold(frozenset({ONE, TWO}), skeleton=True)
    world.clock.now += 1
    await world.announcer.announce()
    stored = world.stored()
    assert stored is not None
    assert not stored.held


async def test_it_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_EVERY", 0.0)
    monkeypatch.setattr(module, "COLLECT", 0.0)
    world = World()
    world.announcer.hold(frozenset({ONE}), skeleton=False)
    async with world.running():
        await world.until_it_holds(ONE)
        first = world.stored()
        async with asyncio.timeout(30):
            while world.stored() == first:
                world.clock.now += 1
                await asyncio.sleep(0)


async def test_a_change_from_any_thread_is_announced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLLECT", 0.0)
    world = World()
    async with world.running():
        world.announcer.hold(frozenset({ONE}), skeleton=False)
        await world.until_it_holds(ONE)
        await asyncio.to_thread(world.announcer.hold, frozenset({TWO}), skeleton=False)
        await world.until_it_holds(TWO)


@pytest.mark.parametrize("failure", [False, TimeoutError()])
async def test_nobody_who_stores_it_is_no_end(failure: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRY_AGAIN", 0.0)
    monkeypatch.setattr(module, "COLLECT", 0.0)
    world = World()
    put, attempts = world.transport.put, 0

    async def fails_twice(*arguments: object) -> bool:
        nonlocal attempts
        attempts += 1
        if attempts > 2:
            return await put(*arguments)  # type: ignore[arg-type]
        if isinstance(failure, Exception):
            raise failure
        return False

    world.transport.put = fails_twice  # type: ignore[method-assign]
    world.announcer.hold(frozenset({ONE}), skeleton=False)
    async with world.running():
        await world.until_it_holds(ONE)
    assert attempts >= 3
