"""Only peers that confirm now what they announced count as holders of other copies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.swarm_fakes import SECRET, announce, identity, member

from moehive.protocol.codec import Message
from moehive.protocol.ids import ExpertKey, PeerId, ShardHash
from moehive.protocol.messages import PEER, GetInventory, Inventory
from moehive.swarm import replicas
from moehive.swarm.announcer import Announcer
from moehive.swarm.member import Member
from moehive.swarm.replicas import count_copies
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

KEY, OTHER = ExpertKey(0, 1), ExpertKey(1, 2)


@asynccontextmanager
async def holder(
    network: MemoryNetwork, number: int, model: ConvertedDirectory, *held: ExpertKey, complete: bool = False
) -> AsyncIterator[Announcer]:
    """A peer that announces experts, and says so when it is asked."""
    key = identity(number)
    async with MemoryTransport(network, key) as transport:
        announcer = Announcer(transport, key, SECRET, model.model_id)

        async def answer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
            assert isinstance(message, GetInventory)
            await reply(Inventory(), (announcer.record().value,))

        await transport.serve(PEER.name, stream_handler(PEER, SECRET, key.peer, "holder", answer))
        announcer.hold(frozenset(held), skeleton=complete, complete=complete)
        assert await announcer.announce()
        yield announcer


async def count(us: Member, model: ConvertedDirectory) -> dict[ShardHash, int]:
    return await count_copies(us, {model.model_id: model.manifest})


async def test_holders_are_counted_by_object(mixtral: ConvertedDirectory) -> None:
    network, manifest = MemoryNetwork(), mixtral.manifest
    async with (
        holder(network, 3, mixtral, KEY),
        holder(network, 4, mixtral, KEY, OTHER),
        holder(network, 5, mixtral, complete=True),
        member(network, 2) as us,
    ):
        copies = await count(us, mixtral)
    assert copies[manifest.experts[KEY].hash] == 3
    assert copies[manifest.experts[OTHER].hash] == 2
    assert copies[manifest.experts[ExpertKey(0, 0)].hash] == 1
    assert copies[manifest.skeleton[0].hash] == 1
    assert copies[ShardHash(manifest.model_id)] == 3


async def test_a_peer_that_is_gone_does_not_count_though_its_announcement_lives_on(mixtral: ConvertedDirectory) -> None:
    network = MemoryNetwork()
    async with holder(network, 3, mixtral, KEY):
        pass
    async with member(network, 2) as us:
        await announce(us.transport, identity(3), [KEY], model=mixtral.model_id)
        copies = await count(us, mixtral)
    assert copies[mixtral.manifest.experts[KEY].hash] == 0


async def test_what_counts_is_what_a_peer_holds_now(mixtral: ConvertedDirectory) -> None:
    network = MemoryNetwork()
    async with holder(network, 3, mixtral, KEY, OTHER) as announcer, member(network, 2) as us:
        announcer.hold(frozenset([OTHER]), skeleton=False)
        copies = await count(us, mixtral)
    assert copies[mixtral.manifest.experts[KEY].hash] == 0
    assert copies[mixtral.manifest.experts[OTHER].hash] == 1


async def test_we_do_not_count(mixtral: ConvertedDirectory) -> None:
    network = MemoryNetwork()
    async with member(network, 2) as us:
        await announce(us.transport, identity(2), [KEY], model=mixtral.model_id)
        copies = await count(us, mixtral)
    assert set(copies.values()) == {0}


async def test_where_nobody_can_be_asked_nothing_is_known(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with member(MemoryNetwork(), 2) as us:

        async def fail(key: bytes) -> object:
            raise TimeoutError

        monkeypatch.setattr(us.transport, "get", fail)
        assert await count(us, mixtral) == {}


async def test_a_bounded_number_is_asked_those_with_the_most_first(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "ASK_AT_MOST", 1)
    network = MemoryNetwork()
    async with (
        holder(network, 3, mixtral, KEY),
        holder(network, 4, mixtral, complete=True),
        member(network, 2) as us,
    ):
        copies = await count(us, mixtral)
    assert set(copies.values()) == {1}
