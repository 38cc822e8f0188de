"""Objects from peers: from all of them at once, verified, and whoever sends wrong bytes is blamed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.sources import FakeSource, OwnShelf, World, downloading, make_data
from support.swarm_fakes import identity, supplying
from support.waiting import until

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.errors import DiskFull, ManifestError, RefusalCode, ShardUnavailable, TransportError
from moehive.swarm.store.content import ContentStore
from moehive.swarm.tiers.loading import forget_frames
from moehive.swarm.transfer.progress import TransferProgress
from moehive.swarm.transfer.sources import Source, Sources, Wanted

DATA = make_data(12)
CHUNKS = ChunkList.of(DATA)
LAST = len(CHUNKS.hashes) - 1
EVERY = list(range(LAST + 1))
A, B, C = identity(1), identity(2), identity(3)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with downloading(tmp_path) as world:
        yield world


@pytest.fixture
async def hurried(tmp_path: Path) -> AsyncIterator[World]:
    """The same, where pauses of seconds pass in a moment."""
    async with downloading(tmp_path, speed=20.0) as world:
        yield world


async def verified(world: World, count: int) -> None:
    """Wait until so many chunks are there."""
    await until(lambda: world.downloads.partials.have(CHUNKS.root).bit_count() >= count)


async def test_all_of_it_once_and_then_never_again(world: World) -> None:
    async with world.source(A, FakeSource(DATA)) as source:
        assert await world.fetch(DATA) == DATA
        assert sorted(source.sent) == EVERY
    assert await world.fetch(DATA) == DATA  # nobody is there to ask
    assert not world.store.partials()
    assert (world.downloads.stats.received, world.downloads.stats.duplicate) == (len(DATA), 0)


async def test_an_empty_object(world: World) -> None:
    async with world.source(A, FakeSource(b"")):
        assert await world.fetch(b"") == b""


async def test_several_sources_share_the_work(world: World) -> None:
    async with world.source(A, FakeSource(DATA)) as a, world.source(B, FakeSource(DATA)) as b:
        assert await world.fetch(DATA) == DATA
        assert a.sent
        assert b.sent
        assert {*a.sent, *b.sent} == {*EVERY}
    assert world.downloads.stats.received == len(DATA)


LIES: dict[str, dict[str, int]] = {
    "a wrong chunk": {"wrong_chunk": 3},
    "a wrong last chunk": {"wrong_chunk": LAST},
    "a wrong list": {"wrong_list": True},
    "out of order": {"out_of_order": True},
}


@pytest.mark.parametrize("lie", LIES)
async def test_who_sends_wrong_bytes_is_banned_and_another_one_asked(world: World, lie: str) -> None:
    async with world.source(A, FakeSource(DATA, **LIES[lie])):
        fetching = asyncio.create_task(world.fetch(DATA))
        await until(lambda: world.standings.banned(A.peer))
        async with world.source(B, FakeSource(DATA)):
            assert await fetching == DATA
    assert not world.standings.banned(B.peer)
    assert world.store.objects() == {CHUNKS.root: len(DATA)}
    world.store.verify(CHUNKS.root)


@pytest.mark.parametrize("lie", LIES)
async def test_wrong_bytes_never_become_an_object(world: World, lie: str) -> None:
    async with world.source(A, FakeSource(DATA, **LIES[lie])):
        with pytest.raises(ShardUnavailable, match="a shard"):
            await world.fetch(DATA, timeout=0.0)
    assert not world.store.has(CHUNKS.root)
    assert not world.store.objects()


async def test_an_error_names_all_who_sent_wrong_bytes(world: World) -> None:
    async with world.source(A, FakeSource(DATA, wrong_chunk=2)), world.source(B, FakeSource(DATA, wrong_chunk=2)):
        with pytest.raises(ShardUnavailable) as caught:
            await world.fetch(DATA, timeout=0.0)
    assert world.downloads.stats.wrong == 2
    for peer in (A.peer, B.peer):
        assert f"peer {peer}: chunk 2 of {CHUNKS.root} is wrong" in str(caught.value)


async def test_the_others_go_on_where_one_stopped(world: World) -> None:
    async with world.source(A, FakeSource(DATA, fails_after=4)) as a, world.source(B, FakeSource(DATA)) as b:
        assert await world.fetch(DATA) == DATA
        assert len(a.sent) <= 4  # fewer where the other was so quick that it was not asked for them
        assert {*a.sent, *b.sent} == {*EVERY}
    assert not world.standings.banned(A.peer)


async def test_a_source_that_falls_silent_costs_no_chunk(world: World) -> None:
    async with world.source(A, FakeSource(DATA, silent_after=2)), world.source(B, FakeSource(DATA)):
        assert await world.fetch(DATA) == DATA
    assert not world.standings.banned(A.peer)


async def test_a_source_that_is_silent_from_the_start_holds_up_nobody(world: World) -> None:
    async with world.source(A, FakeSource(DATA, silent_after=0)), world.source(B, FakeSource(DATA)):
        assert await world.fetch(DATA) == DATA


async def test_a_new_fetch_goes_on_where_an_abandoned_one_stopped(world: World) -> None:
    async with world.source(A, FakeSource(DATA, fails_after=4)) as first:
        with pytest.raises(ShardUnavailable):
            await world.fetch(DATA, timeout=0.0)
        assert len(first.sent) == 4
    async with world.source(B, FakeSource(DATA)) as second:
        assert await world.fetch(DATA) == DATA
        assert len(second.sent) == len(EVERY) - 4


@pytest.mark.parametrize(
    "code", [RefusalCode.NOT_HELD, RefusalCode.BUSY, RefusalCode.INTERNAL, RefusalCode.SHUTTING_DOWN]
)
async def test_a_refusal_sends_us_on(world: World, code: RefusalCode) -> None:
    async with world.source(A, FakeSource(DATA, refuses=code)), world.source(B, FakeSource(DATA)):
        assert await world.fetch(DATA) == DATA
    assert not world.standings.banned(A.peer)


async def test_a_source_that_appears_while_we_wait(world: World) -> None:
    fetching = asyncio.create_task(world.fetch(DATA))
    await asyncio.sleep(0)
    async with world.source(A, FakeSource(DATA)):
        assert await fetching == DATA


@pytest.mark.parametrize("code", [RefusalCode.BUSY, RefusalCode.INTERNAL, RefusalCode.NOT_HELD])
async def test_who_refuses_is_asked_again(hurried: World, code: RefusalCode) -> None:
    async with hurried.source(A, FakeSource(DATA, refuses=code)) as source:
        fetching = asyncio.create_task(hurried.fetch(DATA))
        await asyncio.sleep(0.01)
        source.refuses = None
        assert await fetching == DATA


async def test_nobody_has_it(world: World) -> None:
    with pytest.raises(ShardUnavailable, match="0 peers known"):
        await world.fetch(DATA, timeout=0.0)


async def test_the_reason_of_each_source_is_told(world: World) -> None:
    async with world.source(A, FakeSource(DATA, refuses=RefusalCode.NOT_HELD)):
        with pytest.raises(ShardUnavailable, match=f"{A.peer}.*not_held"):
            await world.fetch(DATA, timeout=0.0)


async def test_whoever_cannot_be_reached_is_told_too(world: World) -> None:
    async with world.source(A, FakeSource(DATA)):
        with (
            world.network.dropping_connections(A.peer),
            pytest.raises(ShardUnavailable, match=f"peer {A.peer}: no such"),
        ):
            await world.fetch(DATA, timeout=0.0)


async def test_a_full_disk_is_nobodys_fault(world: World, tmp_path: Path) -> None:
    world.store = ContentStore(tmp_path / "small", len(DATA) - 1)
    async with world.source(A, FakeSource(DATA)):
        with pytest.raises(DiskFull):
            await world.fetch(DATA)
    assert world.standings.usable([A.peer]) == [A.peer]


async def test_an_error_while_looking_for_sources_ends_it(world: World) -> None:
    async def find() -> Sources:
        raise TransportError("the network is gone")

    with pytest.raises(TransportError):
        await world.downloads.fetch(Wanted(CHUNKS.root, find), world.store)


async def test_two_fetches_of_one_object_download_it_once(world: World) -> None:
    async with world.source(A, FakeSource(DATA)) as source:
        assert await asyncio.gather(world.fetch(DATA), world.fetch(DATA)) == [DATA, DATA]
        assert sorted(source.sent) == EVERY


async def test_a_cancelled_fetch_leaves_what_it_got(world: World) -> None:
    async with world.source(A, FakeSource(DATA, silent_after=5)):
        fetching = asyncio.create_task(world.fetch(DATA))
        await verified(world, 5)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    async with world.source(B, FakeSource(DATA)) as second:
        assert await world.fetch(DATA) == DATA
        assert len(second.sent) == len(EVERY) - 5


# --- parts --------------------------------------------------------------------------------------------------------


async def test_partial_holders_have_it_together(world: World) -> None:
    low, high = frozenset(range(7)), frozenset(range(7, 13))
    async with (
        world.source(A, FakeSource(DATA, have=low), partial=True) as a,
        world.source(B, FakeSource(DATA, have=high), partial=True) as b,
    ):
        assert await world.fetch(DATA) == DATA
        assert (set(a.sent), set(b.sent)) == (low, high)


async def test_a_partial_holder_that_gets_more_is_asked_for_it(hurried: World) -> None:
    async with hurried.source(A, FakeSource(DATA, have=frozenset({0, 1})), partial=True) as source:
        fetching = asyncio.create_task(hurried.fetch(DATA))
        await until(lambda: len(source.sent) >= 2)
        source.have = None
        assert await fetching == DATA


async def test_a_have_map_that_lies_costs_its_peer(world: World) -> None:
    liar = FakeSource(DATA, have=frozenset({0, 1}), claims=frozenset(EVERY))
    async with world.source(A, liar, partial=True):
        fetching = asyncio.create_task(world.fetch(DATA))
        await until(lambda: world.standings.banned(A.peer))
        async with world.source(B, FakeSource(DATA)):
            assert await fetching == DATA


async def test_who_lost_a_chunk_and_says_so_is_not_blamed(world: World) -> None:
    async with (
        world.source(A, FakeSource(DATA, have=frozenset(EVERY) - {4}), partial=False) as lost,
        world.source(B, FakeSource(DATA, have=frozenset({4})), partial=True),
    ):
        assert await world.fetch(DATA) == DATA
        assert sorted(lost.sent) == [index for index in EVERY if index != 4]
    assert not world.standings.banned(A.peer)


async def test_what_is_being_downloaded_can_be_supplied(world: World) -> None:
    async with world.source(A, FakeSource(DATA, silent_after=5)):
        fetching = asyncio.create_task(world.fetch(DATA))
        await verified(world, 5)
        partials, root = world.downloads.partials, CHUNKS.root
        assert partials.chunk_list(root) == CHUNKS
        have = [index for index in EVERY if partials.have(root) >> index & 1]
        assert len(have) == 5
        for index in have:
            start = index * CHUNK_SIZE
            data = partials.read_range(root, start, min(CHUNK_SIZE, len(DATA) - start))
            assert data == DATA[start : start + CHUNK_SIZE]
        absent = next(index for index in EVERY if index not in have)
        assert partials.read_range(root, absent * CHUNK_SIZE, CHUNK_SIZE) is None
        async with world.source(B, FakeSource(DATA)):
            assert await fetching == DATA
    assert partials.chunk_list(root) is None
    assert partials.have(root) == 0


async def test_two_downloaders_help_each_other(world: World, tmp_path: Path) -> None:
    """Each has a source with one half, and the other downloader: what that one has got so far is enough."""
    halves = [frozenset(range(6)), frozenset(range(6, 13))]
    async with downloading(tmp_path / "other", speed=20.0) as other:
        for one, key in ((world, A), (other, B)):
            one.sources[key.peer] = Source(partial=True)
            one.sources[identity(20).peer] = Source(partial=True)
        async with (
            world.source(A, FakeSource(DATA, have=halves[0]), partial=True),
            other.source(B, FakeSource(DATA, have=halves[1]), partial=True),
            supplying(world.network, identity(20), OwnShelf(other)),
            supplying(other.network, identity(20), OwnShelf(world)),
        ):
            assert await asyncio.gather(world.fetch(DATA), other.fetch(DATA)) == [DATA, DATA]


# --- many ---------------------------------------------------------------------------------------------------------

MANY = [make_data(1, first=number) for number in range(30)]


async def test_many_objects_at_once(world: World) -> None:
    class Library(FakeSource):
        """Has all of them."""

        async def __call__(self, peer: object, message: object, payload: object, reply: object) -> None:
            await books[message.hash](peer, message, payload, reply)  # type: ignore[attr-defined, arg-type]

    books = {ChunkList.of(data).root: FakeSource(data) for data in MANY}
    done: list[Path] = []
    seen: list[TransferProgress] = []
    async with world.source(A, Library(b"")), world.source(B, Library(b"")):
        failures = await world.downloads.fetch_many(
            [world.wanted(data) for data in MANY],
            world.store,
            on_done=lambda wanted, path: done.append(path),
            observer=seen.append,
        )
    assert not failures
    assert {path.read_bytes() for path in done} == set(MANY)
    total = sum(map(len, MANY))
    last = seen[-1]
    assert (last.verified, last.total, last.done, last.objects) == (total, total, len(MANY), len(MANY))


async def test_what_nobody_has_does_not_hold_up_the_others(world: World) -> None:
    absent = [world.wanted(make_data(1, first=100 + number), f"absent {number}") for number in range(40)]
    async with world.source(A, FakeSource(DATA)):
        failures = await world.downloads.fetch_many([*absent, world.wanted(DATA)], world.store, timeout=0.0)
    assert failures.keys() == {wanted.hash for wanted in absent}
    assert world.store.has(CHUNKS.root)


# --- memory -------------------------------------------------------------------------------------------------------


async def test_into_memory(world: World) -> None:
    buffer = bytearray(len(DATA))
    async with world.source(A, FakeSource(DATA)), world.source(B, FakeSource(DATA, wrong_chunk=5)):
        for _ in range(2):  # the buffer is used again
            await world.downloads.fetch_to_memory(world.wanted(DATA), memoryview(buffer), deadline=30.0)
            assert buffer == DATA
            buffer[:] = bytes(len(buffer))
    assert not world.store.objects()


async def test_nobody_keeps_the_memory_that_was_fetched_into(world: World) -> None:
    """It may be an expert's, which is to be gone when the expert is."""

    class Memory(bytearray):
        pass

    for silent_after in (None, 3):
        memory = Memory(len(DATA))
        seen = weakref.ref(memory)
        async with world.source(A, FakeSource(DATA, silent_after=silent_after)):
            try:
                await world.downloads.fetch_to_memory(world.wanted(DATA), memoryview(memory), deadline=0.3)
            except ShardUnavailable as error:
                assert silent_after
                forget_frames(error)  # as those do whom the memory belongs to: an error's frames have it
            gc.disable()  # what waits for the collector of cycles waits for long
            try:
                del memory
                await until(lambda seen=seen: seen() is None)  # type: ignore[misc]
            finally:
                gc.enable()


async def test_a_deadline_ends_it_and_says_why(world: World) -> None:
    async with world.source(A, FakeSource(DATA, silent_after=3)):
        fetching = world.downloads.fetch_to_memory(world.wanted(DATA), memoryview(bytearray(len(DATA))), deadline=0.3)
        with pytest.raises(ShardUnavailable, match=r"a shard: .*not complete after"):
            await asyncio.wait_for(fetching, 60)


async def test_a_buffer_of_another_size(world: World) -> None:
    async with world.source(A, FakeSource(DATA)):
        with pytest.raises(ManifestError, match="3 were expected"):
            await world.downloads.fetch_to_memory(world.wanted(DATA), memoryview(bytearray(3)), deadline=30.0)


async def test_what_is_urgent_goes_first(world: World) -> None:
    other = make_data(12, first=60)
    books = {CHUNKS.root: FakeSource(DATA, silent_after=2), ChunkList.of(other).root: FakeSource(other)}

    class Both(FakeSource):
        async def __call__(self, peer: object, message: object, payload: object, reply: object) -> None:
            await books[message.hash](peer, message, payload, reply)  # type: ignore[attr-defined, arg-type]

    async with world.source(A, Both(b"")):
        background = asyncio.create_task(world.fetch(DATA))
        await verified(world, 2)
        buffer = bytearray(len(other))
        await world.downloads.fetch_to_memory(world.wanted(other), memoryview(buffer), deadline=30.0)
        assert buffer == other
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
