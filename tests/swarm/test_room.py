"""Room is made of what is safe to lose: all that was asked for, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest
from support.swarm_fakes import Clock

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.manifest import Manifest
from moehive.swarm.room import ASK_AGAIN, Room
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory


class Swarm:
    """Others hold so many copies of everything that belongs to a model."""

    def __init__(self, copies: int) -> None:
        self.copies = copies
        self.asked = 0

    async def count(self, models: Mapping[ModelId, Manifest]) -> dict[ShardHash, int]:
        self.asked += 1
        return {shard.hash: self.copies for manifest in models.values() for shard in manifest.shards}


@pytest.fixture
def store(mixtral: ConvertedDirectory, tmp_path: Path) -> ContentStore:
    """With a model's manifest and experts, used one after the other."""
    store = ContentStore(tmp_path / "store", 64 << 20)
    store.put(mixtral.manifest.to_bytes())
    for age, shard in enumerate(mixtral.manifest.experts.values()):
        store.put(mixtral.root / shard.file)
        path = store.path(shard.hash)
        assert path is not None
        os.utime(path, (1e6 + age, 1e6 + age))
    return store


def experts(mixtral: ConvertedDirectory) -> list[ShardHash]:
    return [shard.hash for shard in mixtral.manifest.experts.values()]


async def test_what_was_used_longest_ago_goes(store: ContentStore, mixtral: ConvertedDirectory) -> None:
    size = mixtral.manifest.shards[-1].size
    assert await Room(store, Swarm(1).count).make(size + 1)
    assert set(store.objects()) == {mixtral.model_id, *experts(mixtral)[2:]}


async def test_nothing_goes_where_it_would_not_be_enough(store: ContentStore, mixtral: ConvertedDirectory) -> None:
    before = store.objects()
    assert not await Room(store, Swarm(1).count).make(1 << 40)
    assert store.objects() == before


@pytest.mark.parametrize("copies", [0, None])
async def test_the_last_copy_stays_and_so_does_what_nobody_knows_of(store: ContentStore, copies: int | None) -> None:
    async def nobody(models: Mapping[ModelId, Manifest]) -> dict[ShardHash, int]:
        return {}

    before = store.objects()
    assert not await Room(store, nobody if copies is None else Swarm(copies).count).make(1)
    assert store.objects() == before


async def test_what_is_in_use_or_pinned_stays(store: ContentStore, mixtral: ConvertedDirectory) -> None:
    room = Room(store, Swarm(3).count)
    with store.keeping.use(experts(mixtral)):
        assert not await room.make(1)
    store.keeping.pin(mixtral.model_id)
    assert not await room.make(1)
    store.keeping.unpin(mixtral.model_id)
    assert await room.make(1)


async def test_abandoned_downloads_go_first_and_nobody_is_asked_for_them(store: ContentStore) -> None:
    data = Random(1).randbytes(2 * CHUNK_SIZE)
    chunks = ChunkList.of(data)
    with store.open_partial(chunks.root, chunks) as partial:
        partial.write_chunk(0, data[:CHUNK_SIZE])
    swarm, before = Swarm(1), store.objects()
    assert await Room(store, swarm.count).make(CHUNK_SIZE)
    assert store.partials() == {}
    assert (store.objects(), swarm.asked) == (before, 0)


async def test_the_swarm_is_asked_again_after_a_while(store: ContentStore) -> None:
    swarm, clock = Swarm(1), Clock()
    room = Room(store, swarm.count, clock=clock)
    for _ in range(3):
        assert await room.make(1)
    assert swarm.asked == 1
    clock.now += ASK_AGAIN
    assert await room.make(1)
    assert swarm.asked == 2
