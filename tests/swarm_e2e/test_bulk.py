"""The two ways to a node's bytes, with real processes: its own connections, and streams where it cannot be dialled."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.bulk import PATIENCE, Collected
from support.checkpoints import Checkpoints
from support.ports import free_port
from support.processes import NodeProcess, Nodes

from moehive.protocol.ids import ModelId, PeerId, ShardHash
from moehive.protocol.messages import GetLoad, Load
from moehive.protocol.ticket import Ticket
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member
from moehive.swarm.paths import Paths
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.channel import ChunkChannel
from moehive.swarm.transfer.opening import ChannelOpener
from moehive.swarm.transfer.stream_channel import StreamChannel
from moehive.swarm.transfer.tls.channel import TlsChannel
from moehive.swarm.transport.hivemind import HivemindTransport

pytestmark = pytest.mark.swarm

FAMILY = "mixtral"
ELSEWHERE = "127.0.0.2"  # on loopback too, and nobody listens there


@pytest.fixture
def directory(checkpoints: Checkpoints) -> ConvertedDirectory:
    return ConvertedDirectory(checkpoints.converted(FAMILY))


@asynccontextmanager
async def member(ticket: Ticket) -> AsyncIterator[Member]:
    """A client of the swarm."""
    async with (
        HivemindTransport(Identity.ephemeral(), bootstrap=ticket.peers, client_only=True) as transport,
        Member(transport, ticket.secret) as joined,
    ):
        yield joined


@asynccontextmanager
async def channel_to(joined: Member, peer: str) -> AsyncIterator[ChunkChannel]:
    """What the member would download by."""
    opener = ChannelOpener(joined.shards, joined.agent, StreamChannel)
    channel = await opener(PeerId(peer), ())
    try:
        yield channel
    finally:
        await channel.close()


async def whole(channel: ChunkChannel, object_hash: ShardHash) -> bytes:
    """An object's bytes."""
    chunks = await channel.chunk_list(object_hash, timeout=PATIENCE)
    collected = Collected()
    await channel.get_chunks(object_hash, 0, len(chunks.hashes), collected, timeout=PATIENCE)
    assert all(chunks.matches(index, data) for index, data in collected.chunks)
    return collected.bytes


def undialable(nodes: Nodes, model: Path) -> tuple[NodeProcess, Ticket]:
    """A node that names an address at which it is not, as one behind a NAT; and a ticket that leads to it."""
    port = free_port()
    options = ("--listen", f"127.0.0.1:{port}", "--announce", f"{ELSEWHERE}:{port}", "--experts", "all")
    node = nodes.start(model, *options)
    ticket = Ticket.parse(node.ticket)
    return node, Ticket(ticket.secret, (f"/ip4/127.0.0.1/tcp/{port}/p2p/{node.peer}",))


async def test_bytes_come_by_a_connection_of_their_own(nodes: Nodes, directory: ConvertedDirectory) -> None:
    node = nodes.start(directory.root, "--experts", "all", "--upload-slots", "2", "--upload-rate", "500MB/s")
    shard = directory.manifest.shards[0]
    async with member(Ticket.parse(await asyncio.to_thread(lambda: node.ticket))) as joined:
        async with channel_to(joined, node.peer) as channel:
            assert isinstance(channel, TlsChannel)
            assert await whole(channel, shard.hash) == (directory.root / shard.file).read_bytes()
        connection = await joined.peers.connection(PeerId(node.peer))
        sent = 0
        async with asyncio.timeout(PATIENCE):  # it counts after it has sent: we may be quicker
            while sent != shard.size:
                load = await connection.ask(GetLoad(), timeout=PATIENCE)
                assert isinstance(load.message, Load)
                sent = load.message.bytes_sent
    await asyncio.to_thread(node.stop)  # it leaves cleanly though connections are open


async def test_the_bulk_port_can_be_chosen_and_is_where_the_offer_says(
    nodes: Nodes, directory: ConvertedDirectory
) -> None:
    port = free_port()
    node = nodes.start(directory.root, "--experts", "none", "--bulk-port", str(port))
    await asyncio.to_thread(node.ready)
    socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()


async def test_a_peer_that_cannot_be_dialled_sends_by_its_stream(nodes: Nodes, directory: ConvertedDirectory) -> None:
    node, ticket = await asyncio.to_thread(undialable, nodes, directory.root)
    shard = directory.manifest.shards[0]
    async with member(ticket) as joined, channel_to(joined, node.peer) as channel:
        assert isinstance(channel, StreamChannel)
        assert await whole(channel, shard.hash) == (directory.root / shard.file).read_bytes()
        assert not joined.standings.banned(PeerId(node.peer))


def test_a_node_gets_everything_from_one_that_cannot_be_dialled(nodes: Nodes, directory: ConvertedDirectory) -> None:
    manifest = directory.manifest
    _, ticket = undialable(nodes, directory.root)
    fetched = nodes.start(ModelId(manifest.model_id), "--experts", "all", "--join", str(ticket))
    assert fetched.ready()["expertsHeld"] == len(manifest.experts)
    assert "peer cannot be dialled" in fetched.log
    assert "peer banned" not in fetched.log
    store = ContentStore(Paths.of({"MOEHIVE_HOME": str(fetched.home)}).store, 1 << 30)
    for shard in manifest.shards:
        assert store.read(shard.hash) == (directory.root / shard.file).read_bytes()
