"""A member: finds a model, fetches its manifest and skeleton verified, and ends cleanly whatever happens inside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from support.swarm_fakes import MODEL, SECRET, announce, identity, member
from support.toy_experts import tell_load

from moehive.protocol.errors import PeerTimeout, PeerUnreachable
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.manifest import ShardEntry
from moehive.protocol.messages import PEER, GetLoad
from moehive.swarm.member import agent_name
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.base import Record
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SEED, US = identity(1), identity(2)


async def test_sources_of_a_shard(mixtral: ConvertedDirectory) -> None:
    network, manifest = MemoryNetwork(), mixtral.manifest
    one, two, three = (identity(number).peer for number in (3, 4, 5))
    async with member(network, 2) as us:
        await announce(us.transport, identity(3), [ExpertKey(0, 1)], model=manifest.model_id)
        await announce(us.transport, identity(4), [], skeleton=True, model=manifest.model_id)
        await announce(us.transport, identity(5), [ExpertKey(0, 3)], loading=True, model=manifest.model_id)
        directory = us.directory(manifest.model_id)
        await directory.refresh()

        async def partial(shard: ShardEntry | None) -> dict[PeerId, bool]:
            sources = await us.wanted(directory, shard).find()
            return {peer: source.partial for peer, source in sources.items()}

        assert await partial(None) == {one: False, two: False, three: False}  # the manifest: all of them have it
        assert await partial(manifest.experts[ExpertKey(0, 1)]) == {one: False, three: True}
        assert await partial(manifest.experts[ExpertKey(0, 3)]) == {three: False}
        assert await partial(manifest.skeleton[0]) == {two: False, three: True}
        assert directory is us.directory(manifest.model_id)


async def test_a_peer_that_failed_and_announces_itself_anew_is_tried_at_once() -> None:
    network = MemoryNetwork()
    async with member(network, 2) as us:
        for _ in range(5):
            us.standings.blame(PeerTimeout("gone", peer=SEED.peer))
        with pytest.raises(PeerUnreachable, match="no such peer"):
            await us.peers.connection(SEED.peer)
        async with MemoryTransport(network, SEED) as back:
            with pytest.raises(PeerUnreachable, match="not dialled again yet"):
                await us.peers.connection(SEED.peer)
            assert us.standings.usable([SEED.peer]) == []
            await back.serve(PEER.name, stream_handler(PEER, SECRET, SEED.peer, "seed", tell_load))
            await announce(back, SEED, [ExpertKey(0, 1)])
            await us.directory(MODEL).refresh()
            assert us.standings.trusted_first([SEED.peer]) == [SEED.peer]
            assert us.standings.suspected(SEED.peer)  # nobody has to wait for it before it was asked how it is
            await (await us.peers.connection(SEED.peer)).ask(GetLoad(), timeout=10.0)


async def test_an_error_inside_comes_out_as_itself() -> None:
    async def fail() -> None:
        async with member(MemoryNetwork(), 2) as us:
            us.directory(MODEL)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()


async def test_nothing_runs_on_after_leaving() -> None:
    before = asyncio.all_tasks()
    async with member(MemoryNetwork(), 2) as us:
        us.directory(MODEL)
        await us.directory(MODEL).refresh()
    assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()


def test_the_agent_fits_the_wire() -> None:
    assert agent_name().startswith("moehive/")
    assert len(agent_name()) <= 64


async def test_one_look_up_that_hangs_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.swarm.directory.LOOKUP_TIMEOUT", 0.01)
    network = MemoryNetwork()
    async with member(network, 2) as us:
        await announce(us.transport, SEED, [ExpertKey(0, 1)])
        get, attempts = us.transport.get, 0

        async def hangs_once(key: bytes) -> Mapping[str, Record]:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                await asyncio.Event().wait()
            return await get(key)

        us.transport.get = hangs_once  # type: ignore[method-assign]
        directory = await us.wait_for_peers(MODEL, timeout=10.0)
        assert set(directory.holders.inventories) == {SEED.peer}
