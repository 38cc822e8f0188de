"""The engine with a carrier of the test's own: what it does with channels, and with carriers that have bugs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.sources import make_data
from support.waiting import until

from moehive.protocol.chunks import ChunkList, chunk_range
from moehive.protocol.errors import PeerError, PeerRefused, PeerUnreachable, RefusalCode, ShardUnavailable
from moehive.protocol.ids import PeerId, ShardHash
from moehive.swarm.policy.pace import FIRST_TIMEOUT
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer import channels as channels_module
from moehive.swarm.transfer import download as download_module
from moehive.swarm.transfer import engine as engine_module
from moehive.swarm.transfer.channel import ChunkChannel, Deliver
from moehive.swarm.transfer.downloader import Downloader
from moehive.swarm.transfer.sources import Source, Sources, Wanted

DATA = make_data(9)
OTHER = make_data(3, first=50)
OBJECTS = {ChunkList.of(data).root: data for data in (DATA, OTHER)}


class Channel:
    """A ChunkChannel that has OBJECTS, or `has` of them. `during` is called before each chunk."""

    def __init__(
        self, peer: str, during: Callable[[], object] = lambda: None, has: frozenset[int] | None = None
    ) -> None:
        self.peer = PeerId(peer)
        self.broken: PeerError | None = None
        self.closed = 0
        self.requests = 0
        self.withdrawn = 0
        self.hangs = asyncio.Event()
        self.hangs.set()
        self._during = during
        self._has = has

    async def chunk_list(self, object_hash: ShardHash, *, timeout: float) -> ChunkList:
        return ChunkList.of(OBJECTS[object_hash])

    async def have(self, object_hash: ShardHash, *, timeout: float) -> frozenset[int] | None:
        return self._has

    async def get_chunks(
        self, object_hash: ShardHash, first: int, count: int, deliver: Deliver, *, timeout: float
    ) -> None:
        self.requests += 1
        data = memoryview(OBJECTS[object_hash])
        for index in range(first, first + count):
            try:
                await self.hangs.wait()
            except asyncio.CancelledError:
                self.withdrawn += 1
                raise
            self._during()
            offset, length = chunk_range(index, len(data))
            await asyncio.to_thread(deliver, index, data[offset : offset + length])

    async def close(self) -> None:
        self.closed += 1


class World:
    """A downloader and the channels that it may open."""

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self.looks = 0  # for sources
        self.channels: dict[PeerId, Channel] = {}
        self.opened: list[PeerId] = []
        self.standings = Standings()
        self.store = ContentStore(root, 1 << 30)
        self.downloads = Downloader(self.open, self.standings, clock=clock)

    def add(self, channel: Channel) -> Channel:
        self.channels[channel.peer] = channel
        return channel

    async def open(self, peer: PeerId, addresses: Sequence[str]) -> ChunkChannel:
        await asyncio.sleep(0)
        self.opened.append(peer)
        return self.channels[peer]

    async def fetch(self, data: bytes, *peers: str, timeout: float = 30.0) -> bytes:
        async def find() -> Sources:
            self.looks += 1
            return {
                PeerId(peer): Source(partial=self.channels[peer]._has is not None) for peer in peers or self.channels
            }

        wanted = Wanted(ChunkList.of(data).root, find, "a shard")
        return (await self.downloads.fetch(wanted, self.store, timeout=timeout)).read_bytes()


@asynccontextmanager
async def engine(root: Path, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[World]:
    world = World(root, clock)
    async with world.downloads:
        yield world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with engine(tmp_path) as world:
        yield world


async def test_a_channel_is_opened_once_for_all_objects(world: World) -> None:
    world.add(Channel("a"))
    assert await asyncio.gather(world.fetch(DATA), world.fetch(OTHER)) == [DATA, OTHER]
    assert world.opened == ["a"]


async def test_leaving_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with engine(tmp_path) as world:
        channel = world.add(Channel("a"))
        channel.hangs.clear()
        fetching = asyncio.create_task(world.fetch(DATA))
        await until(lambda: channel.requests)
        fetching.cancel()
        await asyncio.wait([fetching])
    assert channel.closed == 1
    assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()


async def test_idle_channels_are_closed_after_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "IDLE", 0.01)
    channel = world.add(Channel("a"))
    await world.fetch(DATA)
    await until(lambda: channel.closed)
    assert await world.fetch(OTHER) == OTHER
    assert world.opened == ["a", "a"]


async def test_of_too_many_channels_idle_ones_give_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_CHANNELS", 2)
    channels = [world.add(Channel(name)) for name in "abcd"]
    for channel, data in zip(channels, [DATA, OTHER] * 2, strict=True):
        assert await world.fetch(data, channel.peer) == data
        world.store.delete(ChunkList.of(data).root)
    await until(lambda: sum(channel.closed for channel in channels) == 2)
    assert not channels[-1].closed


async def test_a_channel_that_broke_is_opened_anew(world: World) -> None:
    def breaks() -> None:
        first.broken = PeerUnreachable("gone", peer="a")
        world.add(Channel("a"))
        raise first.broken

    first = world.add(Channel("a", breaks))
    assert await world.fetch(DATA) == DATA
    assert world.opened == ["a", "a"]
    assert first.closed == 1


async def test_a_bug_of_the_carrier_ends_the_object_and_nothing_else(world: World) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    world.add(Channel("buggy", bug))
    good = world.add(Channel("good"))
    results = await asyncio.gather(world.fetch(DATA, "buggy"), world.fetch(OTHER, good.peer), return_exceptions=True)
    assert isinstance(results[0], BaseExceptionGroup)
    assert results[0].subgroup(RuntimeError)
    assert results[1] == OTHER


async def test_a_carrier_that_says_it_is_done_and_is_not(world: World) -> None:
    class Liar(Channel):
        async def get_chunks(self, *arguments: object, **options: object) -> None:
            self.requests += 1

    world.add(Liar("liar"))
    with pytest.raises(ShardUnavailable, match="ended before its last chunk"):
        await world.fetch(DATA, timeout=0.0)


async def test_no_channel_in_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "OPEN_TIMEOUT", 0.01)

    async def never(peer: PeerId, addresses: Sequence[str]) -> ChunkChannel:
        await asyncio.Event().wait()
        raise AssertionError

    world.downloads._engine._channels._open_channel = never
    world.add(Channel("a"))
    with pytest.raises(ShardUnavailable, match="peer a: no channel within"):
        await world.fetch(DATA, timeout=0.0)


async def test_who_lost_the_race_for_a_chunk_is_told(world: World) -> None:
    """Others have brought what it was asked for, while the object is not complete: its request is withdrawn."""
    slow = world.add(Channel("slow", has=frozenset(range(9))))
    last = world.add(Channel("last", has=frozenset({9})))  # keeps the object from being complete
    fast = world.add(Channel("fast", has=frozenset(range(9))))
    for channel in (slow, last, fast):
        channel.hangs.clear()
    fetching = asyncio.create_task(world.fetch(DATA))
    await until(lambda: slow.requests and last.requests and fast.requests)
    fast.hangs.set()
    await until(lambda: slow.withdrawn)
    assert not last.withdrawn
    last.hangs.set()
    assert await fetching == DATA


async def test_the_connection_of_a_silent_peer_is_given_up_and_somebody_else_looked_for(tmp_path: Path) -> None:
    async with engine(tmp_path, clock=lambda: 20 * time.monotonic()) as world:
        silent = world.add(Channel("silent"))
        silent.hangs.clear()
        fetching = asyncio.create_task(world.fetch(DATA))
        await until(lambda: silent.closed)
        world.add(Channel("other"))
        assert await fetching == DATA
    assert not world.standings.banned(silent.peer)


async def test_where_a_connection_is_given_up_somebody_else_is_looked_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although others still send, and long before the next look for sources is due."""
    monkeypatch.setattr(download_module, "REFRESH", 3600.0)
    now = 0.0

    def once() -> None:
        slow.hangs.clear()

    async with engine(tmp_path, clock=lambda: now) as world:
        silent, slow = world.add(Channel("silent")), world.add(Channel("slow", once))
        silent.hangs.clear()
        slow.hangs.clear()
        fetching = asyncio.create_task(world.fetch(DATA))
        await until(lambda: silent.requests and slow.requests)
        now = FIRST_TIMEOUT - 1.0
        slow.hangs.set()  # for one chunk: it has proved to be alive
        await until(lambda: world.downloads.stats.received)
        world.add(Channel("other"))
        assert "other" not in world.opened
        now = FIRST_TIMEOUT + 1.0
        await until(lambda: "other" in world.opened)
        assert silent.closed
        assert not slow.closed
        assert await fetching == DATA


async def test_where_nobody_can_go_on_somebody_else_is_looked_for_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "REFRESH", 3600.0)

    def refuse() -> None:
        raise PeerRefused(RefusalCode.BUSY, "busy", retry_after=60.0, peer="busy")

    busy = world.add(Channel("busy", refuse))
    busy.hangs.clear()
    fetching = asyncio.create_task(world.fetch(DATA))
    await until(lambda: busy.requests and world.looks == 2)  # at first, and when the contact was made
    world.add(Channel("other"))
    busy.hangs.set()
    assert await fetching == DATA


async def test_small_objects_do_not_wait_for_each_other(world: World) -> None:
    """While one hangs the others come: each has requests of its own, and none at a source that is silent."""
    slow = world.add(Channel("slow"))
    slow.hangs.clear()
    world.add(Channel("fast"))
    hanging = asyncio.create_task(world.fetch(DATA, "slow"))
    await until(lambda: slow.requests)
    assert await world.fetch(OTHER) == OTHER
    slow.hangs.set()
    assert await hanging == DATA
