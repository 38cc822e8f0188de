"""A publisher sees how many copies the others hold together, and ends when they are enough."""

from __future__ import annotations

import asyncio

import pytest
from support.swarm_fakes import SECRET, identity, member

from moehive.node import publishing as module
from moehive.node.publishing import watch_copies
from moehive.node.settings import Publishing
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.inventory import Inventory
from moehive.swarm.announcer import Announcer
from moehive.swarm.directory import Holders
from moehive.swarm.replicas import full_copies
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork

US = PeerId("us")


def holders(mixtral: ConvertedDirectory, **peers: object) -> Holders:
    """Peers by name: "complete", "skeleton", or a number of experts, the first ones, with the skeleton."""
    keys = sorted(mixtral.manifest.experts)

    def inventory(name: str, what: object) -> Inventory:
        held = frozenset(keys[:what] if isinstance(what, int) else ())
        skeleton = what in ("skeleton", "complete") or isinstance(what, int)
        return Inventory(
            PeerId(name), ModelId(mixtral.model_id), 0.0, 1.0, held, skeleton=skeleton, complete=what == "complete"
        )

    return Holders({PeerId(name): inventory(name, what) for name, what in peers.items()})


def test_the_rarest_shard_counts_and_the_others_show_behind_the_point(mixtral: ConvertedDirectory) -> None:
    manifest = mixtral.manifest
    experts, shards = len(manifest.experts), len(manifest.shards)
    cases = [
        ({}, 0.0),
        ({"us": "complete"}, 0.0),
        ({"a": "complete"}, 1.0),
        ({"a": "complete", "b": "complete"}, 2.0),
        ({"a": "complete", "b": experts}, 2.0),
        ({"a": experts // 2}, (shards - experts + experts // 2) / shards),
        ({"a": "complete", "b": "skeleton"}, 1 + (shards - experts) / shards),
    ]
    for peers, copies in cases:
        assert full_copies(manifest, holders(mixtral, **peers), US) == pytest.approx(copies), peers


async def test_it_ends_when_others_hold_enough(mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.001)
    told: list[float] = []
    enough = asyncio.Event()
    async with member(MemoryNetwork(), 2) as us:
        watching = asyncio.create_task(watch_copies(us, mixtral.manifest, Publishing(1, on_copies=told.append), enough))
        announcer = Announcer(us.transport, identity(3), SECRET, mixtral.model_id)
        for held in ([ExpertKey(0, 0)], list(mixtral.manifest.experts)):
            announcer.hold(frozenset(held), skeleton=True, complete=len(held) > 1)
            assert await announcer.announce()
            async with asyncio.timeout(60):
                while not told or told[-1] == 0.0 or (len(held) > 1 and not enough.is_set()):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(60):
            await watching
    assert told[-1] == 1.0
    assert told == sorted(told)
    assert len(told) >= 2


async def test_without_a_number_it_goes_on(mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.001)
    told, enough = asyncio.Event(), asyncio.Event()
    async with member(MemoryNetwork(), 2) as us:
        publishing = Publishing(on_copies=lambda copies: told.set())
        watching = asyncio.create_task(watch_copies(us, mixtral.manifest, publishing, enough))
        async with asyncio.timeout(60):
            await told.wait()
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
    assert not enough.is_set()
