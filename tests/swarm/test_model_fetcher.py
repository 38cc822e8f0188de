"""A model's objects from peers and seeds into a store: verified, with room made, and nothing evicted that just came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import copytree

import pytest
from support.checkpoints import Checkpoints
from support.hub_server import HubServer
from support.swarm_fakes import MODEL, SECRET, identity, member, supplying

from moehive.node.holdings import Holdings
from moehive.protocol.codec import Message
from moehive.protocol.errors import ModelUnavailable, SeedChanged, ShardUnavailable
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.manifest import MANIFEST_NAME, ShardEntry
from moehive.protocol.messages import PEER, GetInventory, Inventory
from moehive.swarm.announcer import Announcer
from moehive.swarm.model_fetcher import ModelFetcher
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.seeds.base import parse_seed
from moehive.swarm.skeleton import lay_out_skeleton
from moehive.swarm.store.base import DiskBudgetFull
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork

SEED = identity(1)


@asynccontextmanager
async def seed(
    network: MemoryNetwork, directory: ConvertedDirectory, *, skeleton: bool = True, but: ShardEntry | None = None
) -> AsyncIterator[None]:
    """A peer that serves the directory's shards, `but` one, and confirms what it announces."""
    manifest = directory.manifest
    held = frozenset(key for key, shard in manifest.experts.items() if shard != but)
    holdings = Holdings(manifest, directory, on_change=lambda: None)
    holdings.verify(shard for shard in manifest.shards if shard != but)
    async with supplying(network, SEED, holdings) as transport:
        announcer = Announcer(transport, SEED, SECRET, manifest.model_id)
        announcer.hold(held, skeleton=skeleton)
        await transport.serve(PEER.name, stream_handler(PEER, SECRET, SEED.peer, "seed", confirming(announcer)))
        assert await announcer.announce()
        yield


def confirming(announcer: Announcer) -> Callable[[PeerId, Message, bytearray, Reply], Awaitable[None]]:
    """Answers GetInventory."""

    async def answer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        assert isinstance(message, GetInventory)
        await reply(Inventory(), (announcer.record().value,))

    return answer


async def test_manifest_and_skeleton_become_a_directory(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path / "store", 1 << 30)
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        manifest = await fetcher.manifest(mixtral.model_id)
        assert manifest == mixtral.manifest
        await fetcher.skeleton(manifest)
    assert set(store.objects()) == {manifest.model_id, *(shard.hash for shard in manifest.skeleton)}  # no experts
    laid_out = lay_out_skeleton(manifest, store, tmp_path / "model")
    for shard in manifest.skeleton:
        assert (laid_out / shard.file).read_bytes() == (mixtral.root / shard.file).read_bytes()
    assert (laid_out / MANIFEST_NAME).read_bytes() == manifest.to_bytes()


async def test_what_is_in_the_store_needs_nobody(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, 1 << 30)
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        await fetcher.skeleton(await fetcher.manifest(mixtral.model_id))
    async with member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        await fetcher.skeleton(await fetcher.manifest(mixtral.model_id, timeout=0.0), timeout=0.0)


async def test_a_model_that_nobody_announces(tmp_path: Path) -> None:
    async with member(MemoryNetwork(), 2) as us, asyncio.timeout(25):  # less than the default of `manifest`
        with pytest.raises(ModelUnavailable, match=MODEL):
            await ModelFetcher(us, ContentStore(tmp_path, 1 << 30)).manifest(MODEL, timeout=0.05)


async def test_a_skeleton_that_nobody_has(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, 1 << 30)
    async with seed(network, mixtral, skeleton=False), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        manifest = await fetcher.manifest(mixtral.model_id)
        with pytest.raises(ShardUnavailable, match="0 peers known"):
            await fetcher.skeleton(manifest, timeout=0.05)


# --- permanent seeds --------------------------------------------------------------------------------------------------


async def test_a_checkpoint_stands_in_for_every_peer(
    checkpoints: Checkpoints, mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    """Nobody is there; the manifest was fetched before."""
    store = ContentStore(tmp_path, 1 << 30)
    store.put(mixtral.manifest.to_bytes())
    async with member(MemoryNetwork(), 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed(str(checkpoints.source("mixtral")))])
        manifest = await fetcher.manifest(mixtral.model_id, timeout=0.0)
        await fetcher.skeleton(manifest, timeout=0.0)
        assert await fetcher.fetch(manifest, manifest.shards, timeout=0.0) == {}
    assert set(store.objects()) == {manifest.model_id, *(shard.hash for shard in manifest.shards)}
    for key in store.objects():
        store.verify(key)


async def test_a_converted_directory_stands_in_with_its_manifest(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    store = ContentStore(tmp_path, 1 << 30)
    async with member(MemoryNetwork(), 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed(str(mixtral.root))])
        manifest = await fetcher.manifest(mixtral.model_id, timeout=0.0)
        assert await fetcher.fetch(manifest, manifest.shards, timeout=0.0) == {}
    assert len(store.objects()) == 1 + len(manifest.shards)


async def test_a_seed_far_away_is_asked_only_for_what_no_peer_has(
    mixtral: ConvertedDirectory, tmp_path: Path, hub: HubServer
) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, 1 << 30)
    alone = mixtral.manifest.experts[ExpertKey(1, 2)]
    others = [shard for shard in mixtral.manifest.shards if shard != alone]
    async with seed(network, mixtral, but=alone), member(network, 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed("hub:org/mixtral")])
        manifest = await fetcher.manifest(mixtral.model_id)
        assert await fetcher.fetch(manifest, others) == {}
        assert hub.requests == [], "not even opened"
        assert await fetcher.fetch(manifest, [alone]) == {}
    assert store.has(alone.hash)


async def test_a_changed_seed_gives_an_error_that_names_the_file_and_never_wrong_bytes(
    checkpoints: Checkpoints, mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    source = Path(copytree(checkpoints.source("mixtral"), tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-100_000:] = bytes(100_000)
        path.write_bytes(data)
    store = ContentStore(tmp_path / "store", 1 << 30)
    store.put(mixtral.manifest.to_bytes())
    async with member(MemoryNetwork(), 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed(str(source))])
        manifest = await fetcher.manifest(mixtral.model_id, timeout=0.0)
        failures = await fetcher.fetch(manifest, manifest.shards, timeout=0.0)
    assert failures
    assert all("safetensors changed since the model was converted" in str(error) for error in failures.values())
    for key in store.objects():
        store.verify(key)
    assert {shard.hash for shard in manifest.shards} == {*store.objects(), *failures} - {manifest.model_id}


async def test_a_seed_of_another_model_is_refused_at_once(
    checkpoints: Checkpoints, mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    store = ContentStore(tmp_path, 1 << 30)
    store.put(mixtral.manifest.to_bytes())
    async with member(MemoryNetwork(), 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed(str(checkpoints.source("qwen3_moe")))])
        with pytest.raises(SeedChanged, match="another model"):
            await fetcher.manifest(mixtral.model_id, timeout=0.0)


async def test_seeds_of_several_models_may_be_named_together(
    checkpoints: Checkpoints, mixtral: ConvertedDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ContentStore(tmp_path, 1 << 30)
    store.put(mixtral.manifest.to_bytes())
    names = [parse_seed(str(checkpoints.source(family))) for family in ("qwen3_moe", "mixtral")]
    async with member(MemoryNetwork(), 2) as us:
        fetcher = ModelFetcher(us, store, names, several=True)
        manifest = await fetcher.manifest(mixtral.model_id, timeout=0.0)
        assert await fetcher.fetch(manifest, manifest.shards, timeout=0.0) == {}
    assert "another model" in str([vars(record) for record in caplog.records])


async def test_a_peer_and_a_seed_share_one_object(
    mixtral: ConvertedDirectory, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The peer gives the chunk list and breaks off; the seed, on this machine, is one more source."""
    network, store = MemoryNetwork(), ContentStore(tmp_path, 1 << 30)
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store, [parse_seed(str(checkpoints.source("mixtral")))])
        manifest = await fetcher.manifest(mixtral.model_id)
        assert await fetcher.fetch(manifest, manifest.shards) == {}
    for key in store.objects():
        store.verify(key)


# --- room -------------------------------------------------------------------------------------------------------------


def budget_for(mixtral: ConvertedDirectory, experts: int) -> int:
    return len(mixtral.manifest.to_bytes()) + experts * next(iter(mixtral.manifest.experts.values())).size


async def test_room_is_made_of_what_others_have_and_not_of_what_just_came(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    network, experts = MemoryNetwork(), list(mixtral.manifest.experts.values())
    store = ContentStore(tmp_path, budget_for(mixtral, 3))
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        manifest = await fetcher.manifest(mixtral.model_id)
        assert await fetcher.fetch(manifest, experts[:3]) == {}
        assert await fetcher.fetch(manifest, experts[3:6]) == {}
    assert set(store.objects()) == {manifest.model_id, *(shard.hash for shard in experts[3:6])}


async def test_without_another_copy_the_budget_stays_full_and_nothing_is_lost(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    network, experts = MemoryNetwork(), list(mixtral.manifest.experts.values())
    store = ContentStore(tmp_path, budget_for(mixtral, 2))
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        manifest = await fetcher.manifest(mixtral.model_id)
        assert await fetcher.fetch(manifest, experts[:2]) == {}
    async with seed(network, mixtral, but=experts[0]), member(network, 2) as us:
        with pytest.raises(DiskBudgetFull, match="moehive store prune"):
            await ModelFetcher(us, store).fetch(manifest, experts[2:4])
    assert set(store.objects()) >= {experts[0].hash}


async def test_what_can_never_fit_is_said_before_anything_comes(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, budget_for(mixtral, 2))
    async with seed(network, mixtral), member(network, 2) as us:
        fetcher = ModelFetcher(us, store)
        manifest = await fetcher.manifest(mixtral.model_id)
        with pytest.raises(DiskBudgetFull, match="shards of"):
            await fetcher.fetch(manifest, list(manifest.experts.values())[:3])
    assert set(store.objects()) == {manifest.model_id}
