"""A node at work, without its network: what it does when its own disk fails it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.swarm_fakes import MODEL, SECRET, announce, identity, supplying
from support.waiting import until

from moehive.kernels.routing import group_by_expert
from moehive.node.holdings import Holdings
from moehive.node.scheduler import QueueLimits
from moehive.node.serving import Serving
from moehive.node.settings import NodeSettings
from moehive.node.state import NodeState
from moehive.node.status import Phase
from moehive.protocol.errors import BudgetTooSmall, CorruptShard, PeerRefused, RefusalCode
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.messages import EXPERT
from moehive.protocol.proofs import ShownToken
from moehive.protocol.session import ClientSession
from moehive.swarm.announcer import Announcer
from moehive.swarm.directory import Directory
from moehive.swarm.dispatch.request import LayerInput, build_request
from moehive.swarm.member import Member
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.direct import connect
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.store.base import NotHeld
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.addresses import host_and_port
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

KEY = ExpertKey(0, 1)


@pytest.mark.parametrize(("damage", "error"), [("deleted", NotHeld), ("changed", CorruptShard)])
async def test_an_expert_whose_file_fails_is_no_longer_held(
    mixtral: ConvertedDirectory, tmp_path: Path, damage: str, error: type[Exception]
) -> None:
    copytree(mixtral.root, tmp_path / "model")
    source, us = ConvertedDirectory(tmp_path / "model"), identity(2)
    transport = MemoryTransport(MemoryNetwork(), us)
    announcer = Announcer(transport, us, SECRET, source.model_id)
    settings = NodeSettings(str(source.root), tmp_path, ram=1 << 20)
    serving = Serving(settings, Member(transport, SECRET), source.manifest, source, announcer)
    shard = source.manifest.experts[KEY]
    serving.holdings.verify([shard])
    file = source.root / shard.file
    file.chmod(0o600)
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(bytes(shard.size))
    with pytest.raises(error), serving._lease(*KEY, torch.float32):
        pass
    assert not serving.holdings.holds(*KEY)


def test_memory_for_less_than_one_expert_is_refused_with_what_would_do(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    us = identity(2)
    transport = MemoryTransport(MemoryNetwork(), us)
    announcer = Announcer(transport, us, SECRET, mixtral.model_id)

    def start(ram: int) -> Serving:
        settings = NodeSettings(str(mixtral.root), tmp_path, ram=ram)
        return Serving(settings, Member(transport, SECRET), mixtral.manifest, mixtral, announcer)

    with pytest.raises(BudgetTooSmall) as refused:
        start(100)
    assert refused.value.needed > 100
    start(refused.value.needed)


async def test_a_node_is_announced_and_supplies_what_it_has_before_it_has_everything(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    network, us, manifest = MemoryNetwork(), identity(2), mixtral.manifest
    first, others = manifest.experts[KEY], Holdings(manifest, mixtral, on_change=lambda: None)
    others.verify([first])
    store, ready = ContentStore(tmp_path, 1 << 30), asyncio.Event()
    store.put(manifest.to_bytes())
    async with (
        supplying(network, identity(1), others) as seed,  # which says that it has more
        MemoryTransport(network, us) as transport,
        Member(transport, SECRET) as member,
    ):
        await announce(seed, identity(1), manifest.experts, model=manifest.model_id)
        announcer = Announcer(transport, us, SECRET, manifest.model_id)
        settings = NodeSettings(manifest.model_id, tmp_path, experts="all", skeleton=False, ram=1 << 20)
        phases: list[Phase] = []
        state = NodeState(phases.append)
        serving, stop = Serving(settings, member, manifest, store, announcer, state), asyncio.Event()
        running = asyncio.create_task(serving.run(stop, ready.set))
        directory = Directory(seed, SECRET, manifest.model_id, member.standings)
        async with asyncio.timeout(60):
            while not (inventory := directory.holders.inventories.get(us.peer)) or KEY not in inventory.held:
                await directory.refresh()
                await asyncio.sleep(0.01)
        assert inventory.loading
        assert not ready.is_set()  # it still looks for the others
        assert serving.holdings.chunk_list(first.hash) is not None
        assert state.view is not None
        status, coverage = state.view.status.to_json(), state.view.coverage()
        assert (status["phase"], status["expertsHeld"]) == ("loading", 1)
        assert (coverage.own, coverage.copies[KEY]) == ({KEY}, 2)
        await until(lambda: serving._facts().disk)
        assert state.view.status.to_json()["disk"]["budgetBytes"] == 1 << 30
        stop.set()
        await running
        assert phases == [Phase.STARTING, Phase.LOADING, Phase.LEAVING]


class Strict(MemoryTransport):
    """As the daemon, it knows no protocol that was not served before."""

    async def stop_serving(self, protocol: str) -> None:
        assert self.handlers.serves(protocol), f"{protocol} is not served"
        await super().stop_serving(protocol)


async def test_who_is_stopped_while_starting_leaves_what_it_serves(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    async with Strict(MemoryNetwork(), identity(2)) as transport, Member(transport, SECRET) as member:
        announcer = Announcer(transport, identity(2), SECRET, mixtral.model_id)
        settings = NodeSettings(str(mixtral.root), tmp_path, ram=1 << 20)
        serving = Serving(settings, member, mixtral.manifest, mixtral, announcer)
        async with asyncio.timeout(60):
            await serving.run(stop, lambda: None)


async def test_what_would_not_be_queued_is_refused_before_anybody_looks_at_it(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    """Over the daemon's streams and over direct connections: a gate that is not asked leaves it to the handler."""
    network, us, other = MemoryNetwork(), identity(2), identity(3)
    call = LayerInput(KEY.layer, torch.ones(1, 64), torch.ones(1, 1), "sum")
    request = build_request(MODEL, call, group_by_expert(torch.tensor([[KEY.expert]]), 8), deadline=10.0)

    async def refused_by(connection: Connection) -> RefusalCode:
        with pytest.raises(PeerRefused) as refused:
            await connection.ask(request.message, request.payload, timeout=30)
        return refused.value.code

    async with (
        MemoryTransport(network, us) as transport,
        Member(transport, SECRET) as member,
        MemoryTransport(network, other) as client,
        ConnectionPool(client, EXPERT, SECRET, "client") as pool,
    ):
        announcer = Announcer(transport, us, SECRET, mixtral.model_id)
        settings = NodeSettings(str(mixtral.root), tmp_path, ram=1 << 20, queue=QueueLimits(requests=0))
        serving, stop, ready = (
            Serving(settings, member, mixtral.manifest, mixtral, announcer),
            asyncio.Event(),
            asyncio.Event(),
        )
        running = asyncio.create_task(serving.run(stop, ready.set))
        await asyncio.wait_for(ready.wait(), 60)
        assert await refused_by(await pool.connection(us.peer)) is RefusalCode.BUSY  # the handler: UNKNOWN_MODEL
        async with direct_connection(serving, us.peer, other.peer) as direct:
            assert await refused_by(direct) is RefusalCode.BUSY
        stop.set()
        await running


@asynccontextmanager
async def direct_connection(serving: Serving, node: PeerId, us: PeerId) -> AsyncIterator[Connection]:
    offer = serving._direct.offer(us, ["/ip4/127.0.0.1/tcp/1"])
    [(host, port)] = filter(None, map(host_and_port, offer.addresses))
    stream = await connect(host, port, offer.fingerprint, node)
    async with Connection(stream, ClientSession(EXPERT, ShownToken(offer.token, node), "client")) as connection:
        yield connection
