"""Seeds among the peers of the download engine: opened when needed, never a source of wrong bytes, never banned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from shutil import copytree

import pytest
from support.checkpoints import Checkpoints
from support.hub_server import HubServer

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.errors import IntegrityError, PeerRefused, PeerUnreachable, RefusalCode
from moehive.protocol.ids import ExpertKey, PeerId, ShardHash
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.seeds.base import parse_seed
from moehive.swarm.seeds.channel import Seeds
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.channel import ChunkChannel

KEY = ExpertKey(1, 3)


async def no_peers(peer: PeerId, addresses: Sequence[str]) -> ChunkChannel:
    raise PeerUnreachable("no peers here", peer=peer)


@pytest.fixture
def manifest(mixtral: ConvertedDirectory) -> Manifest:
    return mixtral.manifest


@pytest.fixture
async def seeds() -> AsyncIterator[Seeds]:
    table = Seeds()
    yield table
    table.close()


async def open_one(seeds: Seeds, manifest: Manifest, shard: ShardEntry) -> ChunkChannel:
    (peer,) = seeds.sources(shard.hash)
    return await seeds.channels(no_peers)(peer, ())


class Sink:
    """Takes chunks and verifies them, as the engine does."""

    def __init__(self, chunks: ChunkList, peer: PeerId) -> None:
        self.taken: dict[int, bytes] = {}
        self._chunks = chunks
        self._peer = peer

    def __call__(self, index: int, data: memoryview) -> None:
        if not self._chunks.matches(index, data):
            raise IntegrityError(f"chunk {index} is wrong", peer=self._peer)
        self.taken[index] = bytes(data)


async def test_any_run_of_chunks_without_asking_for_the_list_first(
    seeds: Seeds, checkpoints: Checkpoints, mixtral: ConvertedDirectory, manifest: Manifest
) -> None:
    largest = max(manifest.shards, key=lambda shard: shard.size)
    data = (mixtral.root / largest.file).read_bytes()
    chunks = ChunkList.of(data)
    seeds.add(parse_seed(str(checkpoints.source("mixtral"))), manifest)
    channel = await open_one(seeds, manifest, largest)
    last = len(chunks.hashes) - 1
    for first, count in ((0, last + 1), (last, 1), (0, 1)):
        sink = Sink(chunks, channel.peer)
        await channel.get_chunks(largest.hash, first, count, sink, timeout=60)
        assert list(sink.taken) == list(range(first, first + count))
        assert all(data[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE] == chunk for i, chunk in sink.taken.items())
    with pytest.raises(PeerRefused, match="chunks"):
        await channel.get_chunks(largest.hash, last, 2, Sink(chunks, channel.peer), timeout=60)
    assert await channel.have(largest.hash, timeout=1) is None


async def test_a_file_that_changed_is_refused_with_its_name_and_not_offered_again(
    seeds: Seeds, checkpoints: Checkpoints, mixtral: ConvertedDirectory, manifest: Manifest, tmp_path: Path
) -> None:
    source = Path(copytree(checkpoints.source("mixtral"), tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        path.write_bytes(data)
    shard = manifest.experts[KEY]
    chunks = mixtral.chunk_list(shard.hash)
    seeds.add(parse_seed(str(source)), manifest)
    channel = await open_one(seeds, manifest, shard)
    sink = Sink(chunks, channel.peer)
    with pytest.raises(PeerRefused, match=r"seed .*safetensors changed since") as refused:
        await channel.get_chunks(shard.hash, 0, len(chunks.hashes), sink, timeout=60)
    assert refused.value.code is RefusalCode.NOT_HELD, "or the engine would ban all of it"
    assert seeds.sources(shard.hash) == {}
    assert await channel.have(shard.hash, timeout=1) == frozenset()
    with pytest.raises(PeerRefused, match="changed since"):
        await channel.chunk_list(shard.hash, timeout=60)


async def test_the_hub_is_not_asked_before_it_is_needed_and_may_come_back(
    seeds: Seeds, hub: HubServer, manifest: Manifest
) -> None:
    seeds.add(parse_seed("hub:org/mixtral"), manifest)
    shard = manifest.experts[KEY]
    (source,) = seeds.sources(shard.hash).values()
    assert source.last_resort
    await seeds.open_nearby()
    assert hub.requests == []
    hub.faults.ignore_ranges = True
    with pytest.raises(PeerUnreachable, match="does not send ranges"):
        await open_one(seeds, manifest, shard)
    hub.faults.ignore_ranges = False
    channel = await open_one(seeds, manifest, shard)
    assert (await channel.chunk_list(shard.hash, timeout=60)).root == shard.hash


async def test_who_gives_up_does_not_wait_for_a_slow_hub(seeds: Seeds, hub: HubServer, manifest: Manifest) -> None:
    seeds.add(parse_seed("hub:org/mixtral"), manifest)
    shard = manifest.experts[KEY]
    channel = await open_one(seeds, manifest, shard)
    hub.faults.drip, asked = threading.Event(), len(hub.ranges)
    try:
        reading = asyncio.create_task(channel.chunk_list(shard.hash, timeout=600))
        async with asyncio.timeout(60):
            while len(hub.ranges) == asked:  # noqa: ASYNC110 - of another thread
                await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait([reading], timeout=20)
        assert reading.cancelled(), "whole shards would take minutes"
    finally:
        hub.faults.drip.set()


async def test_a_seed_of_another_model_is_given_up(
    seeds: Seeds, checkpoints: Checkpoints, hub: HubServer, manifest: Manifest
) -> None:
    seeds.add(parse_seed("hub:org/deepseek_v3_fp8"), manifest)
    with pytest.raises(PeerRefused, match="another model"):
        await open_one(seeds, manifest, manifest.experts[KEY])
    assert seeds.sources(manifest.experts[KEY].hash) == {}


async def test_a_seed_on_this_machine_is_a_source_like_any_other(
    seeds: Seeds, mixtral: ConvertedDirectory, manifest: Manifest
) -> None:
    for _ in range(2):
        seeds.add(parse_seed(str(mixtral.root)), manifest)
    (source,) = seeds.sources(manifest.experts[KEY].hash).values()
    assert not source.last_resort
    assert seeds.sources(ShardHash("0" * 64)) == {}


async def test_peers_are_reached_as_ever(seeds: Seeds) -> None:
    with pytest.raises(PeerUnreachable, match="no peers here"):
        await seeds.channels(no_peers)(PeerId("12D3"), ())
