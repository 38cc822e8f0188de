"""What a node comes to hold: what is here, what can be fetched, and no silence about the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from shutil import copytree

import pytest
from support.checkpoints import Checkpoints
from support.swarm_fakes import Holder, announce, identity, member, supplying
from support.waiting import until

from moehive.node import acquisition as module
from moehive.node.acquisition import Acquisition
from moehive.node.holdings import Holdings
from moehive.node.placement import TURN, Placement, Room
from moehive.node.settings import NodeSettings, Publishing
from moehive.protocol.errors import DiskFull
from moehive.protocol.ids import ExpertKey
from moehive.swarm.member import Member
from moehive.swarm.policy.budgets import ExpertForms
from moehive.swarm.policy.rebalance import Change
from moehive.swarm.seeds.base import parse_seed
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SEED = identity(1)
RAM = 1 << 30
FORMS = ExpertForms(count=1, stored=1, widened=1, making=0, floor=5, read=1.0, widen=1.0)


class Node:
    """What a node has when it begins to acquire."""

    def __init__(
        self,
        us: Member,
        model: ConvertedDirectory,
        source: ObjectSource,
        *,
        ram: int = RAM,
        forms: ExpertForms = FORMS,
        **settings: object,
    ) -> None:
        self.settings = NodeSettings(model.model_id, Path(), **settings)  # type: ignore[arg-type]
        self.holdings = Holdings(model.manifest, source, on_change=lambda: None)
        self.selected: list[int] = []  # how many experts it was told are to be held
        turns = partial(next, count(0.0, TURN))  # every look is in a turn of its own
        room = Room(ram, forms)
        placement = Placement(self.settings, us, model.manifest, source, room, wall_clock=turns)
        self.acquisition = Acquisition(
            self.settings, us, source, self.holdings, placement, on_selected=self.selected.append
        )


@asynccontextmanager
async def seed(network: MemoryNetwork, model: ConvertedDirectory, held: set[ExpertKey]) -> AsyncIterator[None]:
    """A peer that has some experts and the skeleton, and announces all experts."""
    manifest = model.manifest
    holdings = Holdings(manifest, model, on_change=lambda: None)
    holdings.verify([*(manifest.experts[key] for key in held), *manifest.skeleton])
    async with supplying(network, SEED, holdings) as transport:
        await announce(transport, SEED, held, skeleton=True, model=model.model_id)
        yield


async def test_a_converted_directory_that_lacks_a_shard_says_so(
    mixtral: ConvertedDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = ExpertKey(0, 1)
    copytree(mixtral.root, tmp_path / "model")
    (tmp_path / "model" / mixtral.manifest.experts[lost].file).unlink()
    async with member(MemoryNetwork(), 2) as us:
        node = Node(us, mixtral, ConvertedDirectory(tmp_path / "model"), experts="all")
        with caplog.at_level(logging.ERROR):
            assert await node.acquisition.first_pass() == []
    assert node.holdings.experts == mixtral.manifest.experts.keys() - {lost}
    assert mixtral.manifest.experts[lost].file in str([vars(record) for record in caplog.records])


async def test_what_nobody_has_does_not_hold_up_the_rest(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_TRY", 0.3)
    network, store = MemoryNetwork(), ContentStore(tmp_path, RAM)
    held = set(list(mixtral.manifest.experts)[-2:])
    async with seed(network, mixtral, held), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="all")
        left = await node.acquisition.first_pass()
    assert {shard.expert_key for shard in left} == mixtral.manifest.experts.keys() - held
    assert node.holdings.experts == held
    assert node.holdings.skeleton


async def test_shards_are_held_and_supplied_while_others_are_still_coming(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, RAM)
    seen: list[tuple[bool, int]] = []
    async with seed(network, mixtral, set(mixtral.manifest.experts)), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="all")
        node.holdings._on_change = lambda: seen.append((node.holdings.is_loading, len(node.holdings.experts)))
        assert await node.acquisition.first_pass() == []
    assert seen[0] == (True, 0)  # announced before the first byte has come
    assert {(True, count) for count in range(1, len(mixtral.manifest.experts))} <= set(seen)
    assert seen[-1] == (False, len(mixtral.manifest.experts))


@pytest.mark.parametrize("others", [0, 1])
async def test_auto_chooses_what_fits_beside_what_the_store_holds_already(
    mixtral: ConvertedDirectory, tmp_path: Path, others: int
) -> None:
    manifest, network = mixtral.manifest, MemoryNetwork()
    size = next(iter(manifest.experts.values())).size
    room = 3 * size + sum(shard.size for shard in manifest.skeleton)
    disk = room + len(manifest.to_bytes())
    store = ContentStore(tmp_path, disk)
    store.put(manifest.to_bytes())
    for number in range(others):  # of another model
        store.put(bytes([number]) * size)
    async with seed(network, mixtral, set(manifest.experts)), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="auto", disk=disk)
        assert await node.acquisition.first_pass() == []
        assert len(node.holdings.experts) == 3 - others
        again = Node(us, mixtral, store, experts="auto", disk=disk)  # what it has counts as room
        assert await again.acquisition.first_pass() == []
        assert len(again.holdings.experts) == 3 - others


async def test_auto_counts_what_experts_take_in_memory_not_on_disk(mixtral: ConvertedDirectory) -> None:
    """Quantised experts grow when they are loaded."""
    async with member(MemoryNetwork(), 2) as us:
        node = Node(us, mixtral, mixtral, experts="auto", forms=replace(FORMS, widened=RAM // 3, stored=RAM // 3))
        await node.acquisition.first_pass()
    assert len(node.holdings.experts) == 3


async def test_auto_holds_what_nobody_else_does_as_it_is_stored(mixtral: ConvertedDirectory) -> None:
    forms = replace(FORMS, widened=RAM // 6, stored=RAM // 100, floor=5)
    others = sorted(mixtral.manifest.experts)[:3]
    network = MemoryNetwork()
    async with seed(network, mixtral, set(others)), member(network, 2) as us:
        node = Node(us, mixtral, mixtral, experts="auto", forms=forms)
        await node.acquisition.first_pass()
        lacking = mixtral.manifest.experts.keys() - set(others)
        assert node.holdings.experts >= lacking
        assert len(node.holdings.experts) == max(6, len(lacking))


@pytest.mark.parametrize("publish", [None, Publishing()])
async def test_how_many_are_to_be_held_is_told_before_they_are(
    mixtral: ConvertedDirectory, publish: Publishing | None
) -> None:
    async with member(MemoryNetwork(), 2) as us:
        node = Node(us, mixtral, mixtral, experts="all", publish=publish)
        node.holdings._on_change = lambda: seen.append(len(node.selected))
        seen: list[int] = []
        await node.acquisition.first_pass()
    assert node.selected == [len(mixtral.manifest.experts)]
    assert set(seen) == {1}


async def test_what_is_held_is_in_use_until_the_node_ends(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, RAM)
    async with seed(network, mixtral, set(mixtral.manifest.experts)), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="0:0-1")
        assert await node.acquisition.first_pass() == []
        used = store.keeping.now().in_use
        assert {
            mixtral.model_id,
            *(mixtral.manifest.experts[key].hash for key in node.holdings.experts),
        } <= used.objects
        assert mixtral.manifest.experts[ExpertKey(1, 0)].hash not in used
        node.acquisition.close()
        assert store.keeping.now().in_use.objects == set()


async def test_a_seed_makes_experts_obtainable_that_no_peer_has(
    checkpoints: Checkpoints, mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    store = ContentStore(tmp_path, RAM)
    store.put(mixtral.manifest.to_bytes())
    name = parse_seed(str(checkpoints.source("mixtral")))
    async with member(MemoryNetwork(), 2) as us:
        us.seeds.add(name, mixtral.manifest)
        node = Node(us, mixtral, store, experts="auto")
        assert await node.acquisition.first_pass() == []
    assert node.holdings.experts == mixtral.manifest.experts.keys()


@asynccontextmanager
async def maintained(node: Node, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A node that looks at once, again and again, while the context lasts."""
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    task = asyncio.create_task(node.acquisition.maintain(await node.acquisition.first_pass()))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    node.acquisition.close()


async def test_what_the_swarm_lost_is_fetched_and_what_is_not_needed_may_be_evicted(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, store, everything = MemoryNetwork(), ContentStore(tmp_path, RAM), set(mixtral.manifest.experts)
    others = [identity(number) for number in range(3, 7)]
    async with seed(network, mixtral, everything), member(network, 2) as us, AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(MemoryTransport(network, other)) for other in others]
        holders = [Holder(transport, other, mixtral.model_id) for transport, other in zip(peers, others, strict=True)]
        for holder in holders:
            await holder.announce(everything)
        node = Node(us, mixtral, store, experts="auto", ram=4)
        node.selected.clear()
        async with maintained(node, monkeypatch):
            before = node.holdings.experts
            assert len(before) == 4
            lost = everything - before
            for holder in holders:  # they keep what this node holds
                await holder.announce(before)
            await announce(us.transport, SEED, skeleton=True, complete=True, model=mixtral.model_id)
            await until(lambda: not node.holdings.experts & before)
            assert node.holdings.experts <= lost
            await until(lambda: len(node.holdings.experts) == 4)
            used = store.keeping.now().in_use
            assert all(mixtral.manifest.experts[key].hash in used for key in node.holdings.experts)
            assert all(mixtral.manifest.experts[key].hash not in used for key in before)
            assert all(shard.hash in used for shard in mixtral.manifest.skeleton)
        assert set(node.selected) == {4}
        assert len(node.selected) > 1, "each change is told"


async def test_whether_an_expert_that_nobody_had_is_still_worth_it_is_seen_anew(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, store, everything = MemoryNetwork(), ContentStore(tmp_path, RAM), set(mixtral.manifest.experts)
    looks: list[frozenset[ExpertKey]] = []

    async def look(self: Placement, held: frozenset[ExpertKey]) -> Change:
        looks.append(held)
        return Change()

    monkeypatch.setattr(Placement, "look", look)
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    async with seed(network, mixtral, everything), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="auto", ram=4)
        left = [mixtral.manifest.experts[min(everything)], *mixtral.manifest.skeleton]
        task = asyncio.create_task(node.acquisition.maintain(left))
        await until(lambda: node.holdings.skeleton and len(looks) > 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not node.holdings.experts


async def test_a_full_disk_does_not_end_the_looking(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, store = MemoryNetwork(), ContentStore(tmp_path, RAM)
    looks: list[frozenset[ExpertKey]] = []

    async def full(self: Placement, held: frozenset[ExpertKey]) -> Change:
        looks.append(held)
        raise DiskFull("no room")

    monkeypatch.setattr(Placement, "look", full)
    async with seed(network, mixtral, set(mixtral.manifest.experts)), member(network, 2) as us:
        node = Node(us, mixtral, store, experts="auto", ram=4)
        async with maintained(node, monkeypatch):
            await until(lambda: len(looks) > 2)


async def test_of_a_directory_other_experts_are_held_without_fetching(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    others = [identity(number) for number in range(3, 7)]
    async with member(network, 2) as us, AsyncExitStack() as stack:
        node = Node(us, mixtral, mixtral, experts="auto", ram=4)
        async with maintained(node, monkeypatch):
            before = node.holdings.experts
            for other in others:
                transport = await stack.enter_async_context(MemoryTransport(network, other))
                await Holder(transport, other, mixtral.model_id).announce(before)
            await until(lambda: not node.holdings.experts & before and len(node.holdings.experts) == 4)
            assert node.holdings.experts <= everything - before
