"""Who holds what: only what is signed, fresh, and filed under its own name counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from support.swarm_fakes import MODEL, SECRET, Clock, announce, identity

from moehive.protocol.errors import TransportError
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.inventory import Inventory, directory_key, encode_inventory, swarm_tag
from moehive.swarm.directory import Directory
from moehive.swarm.member import is_genuine
from moehive.swarm.standings import Standings
from moehive.swarm.transport.base import Record
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

A, B, US = identity(1), identity(2), identity(9)
ONE, TWO = ExpertKey(1, 1), ExpertKey(2, 2)
NOW = 1_000_000.0


class World:
    """A directory on a network whose table takes everything, and a clock for all of them."""

    def __init__(self) -> None:
        self.clock = Clock(NOW)
        self.transport = MemoryTransport(MemoryNetwork(clock=self.clock), US)
        self.standings = Standings(self.clock)
        self.directory = Directory(self.transport, SECRET, MODEL, self.standings, wall_clock=self.clock)

    async def file(self, subkey: PeerId, record: bytes, expires: float = NOW + 60) -> None:
        assert await self.transport.put(directory_key(SECRET, MODEL), subkey, Record(record, expires))

    async def seen(self) -> dict[PeerId, Inventory]:
        await self.directory.refresh()
        return dict(self.directory.holders.inventories)


def claim(**changes: object) -> Inventory:
    """A good claim of A's, changed."""
    good = Inventory(A.peer, MODEL, NOW, NOW + 60, frozenset({ONE}), swarm=swarm_tag(SECRET))
    return replace(good, **changes)  # type: ignore[arg-type]


async def test_holders_of_experts_and_their_addresses() -> None:
    world = World()
    await announce(world.transport, A, [ONE], skeleton=True, clock=world.clock)
    await announce(world.transport, B, [ONE, TWO], clock=world.clock)
    await world.directory.refresh()
    holders = world.directory.holders
    assert set(holders.of(ONE)) == {A.peer, B.peer}
    assert holders.of(TWO) == (B.peer,)
    assert holders.of(ExpertKey(7, 7)) == ()
    assert holders.replicas == {ONE: 2, TWO: 1}
    assert holders.addresses(A.peer) == tuple(world.transport.addresses)
    assert holders.addresses(US.peer) == ()


async def test_the_latest_announcement_counts_and_a_farewell_ends_it() -> None:
    world = World()
    await announce(world.transport, A, [ONE], clock=world.clock)
    assert (await world.seen())[A.peer].held == {ONE}
    world.clock.now += 1
    await announce(world.transport, A, [TWO], clock=world.clock)
    assert (await world.seen())[A.peer].held == {TWO}
    world.clock.now += 1
    await announce(world.transport, A, [], clock=world.clock)
    assert await world.seen() == {}


async def test_an_older_announcement_does_not_come_back() -> None:
    world = World()
    old = encode_inventory(claim(), A.sign)
    await announce(world.transport, A, [], clock=lambda: NOW + 1)  # a farewell
    world.clock.now += 1
    await world.seen()
    await world.file(A.peer, old, expires=NOW + 600)  # replayed by somebody
    assert await world.seen() == {}


async def test_each_newer_announcement_of_something_is_told_once() -> None:
    world, told = World(), []
    world.directory = Directory(
        world.transport, SECRET, MODEL, world.standings, on_announcement=told.append, wall_clock=world.clock
    )
    for held, times in (([ONE], 1), ([ONE], 2), ([], 2)):
        await announce(world.transport, A, held, clock=world.clock)
        for _ in range(2):
            await world.seen()
        assert told == [A.peer] * times
        world.clock.now += 1


async def test_what_expires_is_forgotten() -> None:
    world = World()
    await world.file(A.peer, encode_inventory(claim(), A.sign))
    assert set(await world.seen()) == {A.peer}
    world.clock.now += 60
    assert await world.seen() == {}


FORGERIES: dict[str, Callable[[], tuple[PeerId, bytes]]] = {
    "signed by another": lambda: (A.peer, encode_inventory(claim(), B.sign)),
    "a flipped byte": lambda: (A.peer, encode_inventory(claim(), A.sign)[:-1] + b"\1"),
    "no record": lambda: (A.peer, b"\xff" * 100),
    "expired, kept under a later expiry": lambda: (A.peer, encode_inventory(claim(expires=NOW - 1), A.sign)),
    "filed under another peer": lambda: (B.peer, encode_inventory(claim(), A.sign)),
    "of another model": lambda: (A.peer, encode_inventory(claim(model=ModelId("cd" * 32)), A.sign)),
    "of another swarm": lambda: (A.peer, encode_inventory(claim(swarm=swarm_tag(b"x" * 32)), A.sign)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_forgeries_are_not_believed_and_their_victim_is_not_blamed(forgery: str) -> None:
    world = World()
    subkey, record = FORGERIES[forgery]()
    await world.file(subkey, record)
    assert await world.seen() == {}
    assert not world.standings.banned(A.peer)
    assert not world.standings.banned(B.peer)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"issued": NOW + 3600, "expires": NOW + 3660}, id="from the future"),
        pytest.param({"expires": NOW + 86400}, id="that lives for a day"),
    ],
)
async def test_who_signs_an_impossible_announcement_is_banned(changes: dict[str, float]) -> None:
    world = World()
    await world.file(A.peer, encode_inventory(claim(**changes), A.sign))
    assert await world.seen() == {}
    assert world.standings.banned(A.peer)


async def test_one_bad_record_does_not_hide_the_others() -> None:
    world = World()
    await world.file(A.peer, b"nonsense" * 20)
    await announce(world.transport, B, [ONE], clock=world.clock)
    assert set(await world.seen()) == {B.peer}


async def test_what_a_peer_refuses_no_longer_counts_until_it_announces_it_anew() -> None:
    world = World()
    await announce(world.transport, A, [ONE, TWO], clock=world.clock)
    await world.seen()
    world.directory.refuted(A.peer, [ONE], "gone")
    await world.seen()  # the same announcement again
    assert world.directory.holders.of(ONE) == ()
    assert world.directory.holders.of(TWO) == (A.peer,)
    assert not world.standings.banned(A.peer)  # it may have lost it a moment ago
    world.clock.now += 5
    await announce(world.transport, A, [ONE, TWO], clock=world.clock)
    await world.seen()
    assert world.directory.holders.of(ONE) == (A.peer,)
    world.directory.refuted(A.peer, [ONE], "gone")
    assert world.standings.banned(A.peer)
    assert world.directory.holders.inventories == {}


async def test_an_announcement_from_before_a_refusal_is_no_lie() -> None:
    world = World()
    await announce(world.transport, A, [ONE, TWO], clock=world.clock)
    await world.seen()
    world.clock.now += 5
    await announce(world.transport, A, [ONE, TWO], clock=world.clock)  # renewed; we have not looked since
    world.clock.now += 1
    world.directory.refuted(A.peer, [ONE], "left a moment ago")
    await world.seen()
    world.directory.refuted(A.peer, [ONE], "left a moment ago")
    assert not world.standings.banned(A.peer)
    world.clock.now += 5
    await announce(world.transport, A, [ONE, TWO], clock=world.clock)
    await world.seen()
    world.directory.refuted(A.peer, [ONE], "never held")
    assert world.standings.banned(A.peer)


async def test_a_peer_may_leave_an_expert_take_it_again_and_leave_it_again() -> None:
    """As nodes do that follow the swarm: whoever has not seen the newest announcement yet asks for what was left."""
    world = World()
    for held in ([ONE, TWO], [TWO], [ONE, TWO]):
        await announce(world.transport, A, held, clock=world.clock)
        await world.seen()
        if ONE in held:
            world.directory.refuted(A.peer, [ONE], "left")
        world.clock.now += 5
    assert not world.standings.banned(A.peer)


async def test_a_peer_may_lose_one_expert_after_the_other() -> None:
    world = World()
    for key in (ONE, TWO):
        await announce(world.transport, A, [key], clock=world.clock)
        await world.seen()
        world.directory.refuted(A.peer, None, "gone")
        world.clock.now += 5
    assert not world.standings.banned(A.peer)


async def test_look_ups_at_the_same_time_are_one() -> None:
    world = World()
    asked = 0

    async def counted(key: bytes) -> dict[str, Record]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return {}

    world.transport.get = counted  # type: ignore[method-assign]
    await asyncio.gather(*(world.directory.refresh() for _ in range(5)))
    assert asked == 1


@pytest.mark.parametrize("failure", [TimeoutError(), TransportError("p2pd has stopped")])
async def test_run_survives_a_table_that_does_not_answer(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    world, answered = World(), asyncio.Event()
    monkeypatch.setattr("moehive.swarm.directory.REFRESH_EVERY", 0.0)
    failures = [failure, failure]

    async def fails_twice(key: bytes) -> dict[str, Record]:
        if failures:
            raise failures.pop()
        answered.set()
        return {}

    world.transport.get = fails_twice  # type: ignore[method-assign]
    running = asyncio.create_task(world.directory.run())
    async with asyncio.timeout(30):
        await answered.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_a_table_that_hangs_costs_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr("moehive.swarm.directory.LOOKUP_TIMEOUT", 0.02)

    async def hang(key: bytes) -> dict[str, Record]:
        await asyncio.Event().wait()
        return {}

    world.transport.get = hang  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        await world.directory.refresh()


def test_what_a_storing_peer_takes() -> None:
    """Independent of its clock: refusing one record makes the carrier drop a peer's whole answer."""
    long_ago = time.time() - 1e6
    good = claim(issued=long_ago, expires=long_ago + 60)
    record = Record(encode_inventory(good, A.sign), good.expires)
    assert is_genuine(b"", A.peer, record)
    assert not is_genuine(b"", B.peer, record)
    assert not is_genuine(b"", A.peer, Record(encode_inventory(good, B.sign), good.expires))
    assert not is_genuine(b"", A.peer, Record(record.value, good.expires + 3600))
    assert not is_genuine(b"", A.peer, Record(b"nonsense", good.expires))


async def test_a_seed_of_the_whole_model_that_computes_nothing_is_a_supplier() -> None:
    world = World()
    await world.file(A.peer, encode_inventory(claim(held=frozenset(), complete=True), A.sign))
    assert (await world.seen())[A.peer].complete


async def test_who_comes_late_to_a_look_up_that_hangs_gets_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world, attempts = World(), 0
    monkeypatch.setattr("moehive.swarm.directory.LOOKUP_TIMEOUT", 0.01)

    async def hangs_once(key: bytes) -> dict[str, Record]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await asyncio.Event().wait()
        return {}

    world.transport.get = hangs_once  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        await world.directory.refresh()
    await world.directory.refresh()
    assert attempts == 2


async def test_no_look_up_outlives_the_directory() -> None:
    world, ended = World(), asyncio.Event()

    async def hang(key: bytes) -> dict[str, Record]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return {}

    world.transport.get = hang  # type: ignore[method-assign]
    running = asyncio.create_task(world.directory.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    async with asyncio.timeout(30):
        await ended.wait()
