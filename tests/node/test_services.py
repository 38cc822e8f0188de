"""What a node answers to strangers: bytes that are verified, experts that it holds, and reasons for everything else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.swarm_fakes import MODEL, SECRET, Clock, identity
from support.waiting import until

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.routing import group_by_expert
from moehive.node.compute import Work, run_batch
from moehive.node.demand import MEMORY, DemandMeter
from moehive.node.holdings import Holdings
from moehive.node.scheduler import QueueFacts, QueueLimits
from moehive.node.services import ExpertService, PeerService, ShardService
from moehive.node.worker import ComputeWorker
from moehive.protocol import limits
from moehive.protocol.chunks import ChunkList
from moehive.protocol.codec import Message, decode, encode
from moehive.protocol.errors import PeerRefused, RefusalCode
from moehive.protocol.ids import ExpertKey, ModelId, PeerId, ShardHash
from moehive.protocol.messages import (
    EXPERT,
    PEER,
    SHARD,
    BulkOffer,
    Chunk,
    ChunkHashes,
    Demand,
    ExpertsDone,
    GetChunkList,
    GetChunks,
    GetDemand,
    GetHave,
    GetInventory,
    GetLoad,
    Have,
    Load,
    OpenBulk,
    ProtocolSpec,
    RunExperts,
)
from moehive.swarm.dispatch.request import ExpertRequest, LayerInput, build_request
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.uploads import Uploads
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

KEY = ExpertKey(0, 1)
SPEC = FfnSpec()


def lease(layer: int, expert: int, dtype: torch.dtype) -> nullcontext[ExpertWeights]:
    """Weights for Mixtral's tiny experts."""
    generator = torch.Generator().manual_seed(expert)
    return nullcontext(
        ExpertWeights(torch.randn(96, 64, generator=generator), torch.randn(64, 48, generator=generator))
    )


OFFER = BulkOffer(addresses=("/ip4/127.0.0.1/tcp/4002",), fingerprint=bytes(32), token=bytes(32), lifetime=30.0)


def offer(peer: PeerId) -> BulkOffer:
    assert peer == identity(2).peer
    return OFFER


class Node:
    """The services of a node that holds one expert and the skeleton."""

    def __init__(self, root: Path) -> None:
        self.source = ConvertedDirectory(root)
        self.manifest = self.source.manifest
        self.shard = self.manifest.experts[KEY]
        self.holdings = Holdings(self.manifest, self.source, on_change=lambda: None)
        self.holdings.verify([self.shard, *self.manifest.skeleton])
        self.worker = ComputeWorker(lease, SPEC, QueueLimits())
        self.uploads = Uploads()
        demand = DemandMeter(clock=Clock())
        self.experts = ExpertService(self.holdings, self.worker, self.uploads, demand=demand)
        self.shards = ShardService(self.holdings, self.uploads, offer)
        self.peers = PeerService(self.holdings, self.worker, self.uploads, lambda: b"a signed record", demand)

    def request(self, expert: int = KEY.expert, **changes: object) -> ExpertRequest:
        call = LayerInput(KEY.layer, torch.ones(2, 64), torch.full((2, 1), 0.5), "sum")
        assignments = group_by_expert(torch.tensor([[expert], [expert]]), 8)
        built = build_request(self.manifest.model_id, call, assignments, deadline=10.0)
        return replace(built, message=replace(built.message, **changes))  # type: ignore[arg-type]

    @asynccontextmanager
    async def serving(self, spec: ProtocolSpec) -> AsyncIterator[Connection]:
        """A client's connection to it."""
        service = {EXPERT.name: self.experts, SHARD.name: self.shards, PEER.name: self.peers}[spec.name]
        network = MemoryNetwork()
        working = asyncio.create_task(self.worker.run())
        async with MemoryTransport(network, identity(1)) as server, MemoryTransport(network, identity(2)) as client:
            await server.serve(spec.name, stream_handler(spec, SECRET, server.peer, "node", service))
            async with ConnectionPool(client, spec, SECRET, "client") as pool:
                yield await pool.connection(server.peer)
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


@pytest.fixture
def node(mixtral: ConvertedDirectory) -> Node:
    return Node(mixtral.root)


async def code_of(connection: Connection, message: object, payload: object = ()) -> RefusalCode:
    with pytest.raises(PeerRefused) as refused:
        await connection.ask(message, payload, timeout=60)  # type: ignore[arg-type]
    return refused.value.code


# --- experts ----------------------------------------------------------------------------------------------------------


async def test_a_held_expert_is_computed(node: Node) -> None:
    request = node.request()
    async with node.serving(EXPERT) as connection:
        answer = await connection.ask(request.message, request.payload, timeout=60)
    assert isinstance(answer.message, ExpertsDone)
    [expected] = run_batch([Work.parse(request.message, bytearray(b"".join(request.payload)))], lease, SPEC)
    torch.testing.assert_close(request.read_answer(answer.payload).output, expected)


async def test_uploads_learn_who_asks_for_experts_and_how_long_that_takes(node: Node) -> None:
    """Or they would not make way."""
    request = node.request()
    async with node.serving(EXPERT) as connection:
        await connection.ask(request.message, request.payload, timeout=60)
    assert node.uploads.beside(identity(2).peer)
    [sample] = node.uploads._samples
    assert sample.rows == request.message.rows
    assert sample.seconds > 0


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": ModelId(MODEL)}, RefusalCode.UNKNOWN_MODEL),
        ({"layer": 1}, RefusalCode.NOT_HELD),
        ({"layer": 999}, RefusalCode.NOT_HELD),
        ({"experts": (2,)}, RefusalCode.NOT_HELD),
        ({"experts": (65536,)}, RefusalCode.NOT_HELD),
        ({"hidden": 32, "tokens": 4}, RefusalCode.BAD_REQUEST),
        ({"tokens": 1}, RefusalCode.BAD_REQUEST),  # more rows than tokens
        ({"counts": (1,)}, RefusalCode.BAD_REQUEST),  # the payload does not fit
        ({"experts": (1, 2)}, RefusalCode.BAD_REQUEST),
    ],
)
async def test_what_is_refused_and_why(node: Node, changes: dict[str, object], code: RefusalCode) -> None:
    request, good = node.request(**changes), node.request()
    async with node.serving(EXPERT) as connection:
        assert await code_of(connection, request.message, request.payload) is code
        await connection.ask(good.message, good.payload, timeout=60)  # the stream goes on


async def test_a_token_index_outside_the_request_is_refused(node: Node) -> None:
    request = node.request()
    payload = bytearray(b"".join(request.payload))
    payload[2 * 64 * 4 : 2 * 64 * 4 + 4] = b"\x07\0\0\0"
    async with node.serving(EXPERT) as connection:
        assert await code_of(connection, request.message, [payload]) is RefusalCode.BAD_REQUEST


async def test_more_rows_than_a_token_has_choices_are_refused(node: Node) -> None:
    """Small requests must not ask for much work."""
    node.holdings.verify(node.manifest.experts.values())
    call = LayerInput(0, torch.ones(1, 64), torch.ones(1, 8), "sum")
    request = build_request(node.manifest.model_id, call, group_by_expert(torch.arange(8)[None], 8), deadline=10.0)
    async with node.serving(EXPERT) as connection:
        assert await code_of(connection, request.message, request.payload) is RefusalCode.BAD_REQUEST


async def test_a_node_that_leaves_takes_no_more(node: Node) -> None:
    node.experts.refuse_more()
    request = node.request()
    async with node.serving(EXPERT) as connection:
        assert await code_of(connection, request.message, request.payload) is RefusalCode.SHUTTING_DOWN


async def test_draining_waits_until_the_answer_is_written(node: Node) -> None:
    computing = asyncio.Event()

    def slow(layer: int, expert: int, dtype: torch.dtype) -> nullcontext[ExpertWeights]:
        go_on.wait(60)
        return lease(layer, expert, dtype)

    go_on, loop = threading.Event(), asyncio.get_running_loop()
    node.worker = ComputeWorker(slow, SPEC, QueueLimits())
    node.experts = ExpertService(node.holdings, node.worker)
    written: list[Message] = []

    async def reply(answer: Message, body: object = (), *, more: bool = False) -> None:
        await asyncio.sleep(0)
        written.append(answer)

    request = node.request()
    working = asyncio.create_task(node.worker.run())
    payload = bytearray(b"".join(request.payload))
    asking = asyncio.create_task(node.experts(identity(2).peer, request.message, payload, reply))
    loop.call_soon(computing.set)
    await computing.wait()
    node.experts.refuse_more()
    draining = asyncio.create_task(node.experts.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    go_on.set()
    await asyncio.wait_for(draining, 60)
    assert [type(answer) for answer in written] == [ExpertsDone]
    await asking
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working


async def test_nan_and_infinity_are_the_callers_business(node: Node) -> None:
    request = node.request()
    hidden = torch.full((2, 64), float("nan")).numpy().tobytes()
    payload = bytearray(b"".join(request.payload))
    payload[: len(hidden)] = hidden
    async with node.serving(EXPERT) as connection:
        answer = await connection.ask(request.message, [payload], timeout=60)
    assert request.read_answer(answer.payload).output.isnan().all()


# --- shards -----------------------------------------------------------------------------------------------------------


async def test_chunk_list_and_chunks_of_what_is_held(node: Node) -> None:
    async with node.serving(SHARD) as connection:
        listed = await connection.ask(GetChunkList(hash=node.shard.hash), timeout=60)
        assert isinstance(listed.message, ChunkHashes)
        chunks = ChunkList.from_bytes(listed.message.size, listed.payload)
        assert (chunks.root, chunks.size) == (node.shard.hash, node.shard.size)
        sent = await connection.ask(GetChunks(hash=node.shard.hash, first=0, count=1), timeout=60)
        assert sent.message == Chunk(index=0)
        assert sent.payload == (node.source.root / node.shard.file).read_bytes()
        assert node.uploads.bytes_sent == node.shard.size
        manifest = await connection.ask(GetChunkList(hash=ShardHash(node.manifest.model_id)), timeout=60)
        assert isinstance(manifest.message, ChunkHashes)


async def test_what_is_held_is_held_wholly(node: Node) -> None:
    async with node.serving(SHARD) as connection:
        have = await connection.ask(GetHave(hash=node.shard.hash), timeout=60)
        assert have.message == Have(size=node.shard.size, complete=True)
        assert have.payload == b""
        assert await code_of(connection, GetHave(hash=ShardHash("0" * 64))) is RefusalCode.NOT_HELD


async def test_the_offer_of_a_connection_is_for_who_asks(node: Node) -> None:
    async with node.serving(SHARD) as connection:
        assert (await connection.ask(OpenBulk(), timeout=60)).message == OFFER


async def test_what_is_not_held_is_not_sent(node: Node) -> None:
    other = node.manifest.experts[ExpertKey(1, 1)].hash  # it lies in the directory, but was not verified
    async with node.serving(SHARD) as connection:
        for absent in (other, ShardHash("0" * 64)):
            assert await code_of(connection, GetChunkList(hash=absent)) is RefusalCode.NOT_HELD
            assert await code_of(connection, GetChunks(hash=absent, first=0, count=1)) is RefusalCode.NOT_HELD


@pytest.mark.parametrize(("first", "count"), [(1, 1), (0, 2), (16383, 1)])
async def test_chunks_beyond_the_end_are_refused(node: Node, first: int, count: int) -> None:
    async with node.serving(SHARD) as connection:
        asked = GetChunks(hash=node.shard.hash, first=first, count=count)
        assert await code_of(connection, asked) is RefusalCode.BAD_REQUEST


async def test_bytes_that_went_bad_are_never_sent(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    node = Node(Path(copytree(mixtral.root, tmp_path / "copy")))
    path = node.source.root / node.shard.file
    path.write_bytes(b"x" * node.shard.size)
    async with node.serving(SHARD) as connection:
        asked = GetChunks(hash=node.shard.hash, first=0, count=1)
        assert await code_of(connection, asked) is RefusalCode.NOT_HELD
    async with node.serving(EXPERT) as connection:
        request = node.request()
        assert await code_of(connection, request.message, request.payload) is RefusalCode.NOT_HELD


async def test_uploads_beyond_the_slots_wait_and_beyond_that_come_back_later(node: Node) -> None:
    uploads = Uploads(UploadLimits(slots=1, waiting_per_peer=3))
    node.shards = ShardService(node.holdings, uploads, offer)
    async with node.serving(SHARD) as connection:
        running = uploads.ask(identity(3).peer)
        asked = [asyncio.create_task(connection.ask(GetChunkList(hash=node.shard.hash), timeout=60)) for _ in range(10)]
        await until(lambda: sum(one.done() for one in asked) == 7)
        uploads.end(running)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, PeerRefused)]
        assert len(refused) == 7
        assert {answer.code for answer in refused} == {RefusalCode.BUSY}
        assert all(answer.retry_after > 0 for answer in refused)
        await connection.ask(GetChunkList(hash=node.shard.hash), timeout=60)


# --- peer -------------------------------------------------------------------------------------------------------------


async def test_inventory_and_load(node: Node) -> None:
    async with node.serving(PEER) as connection:
        record = await connection.ask(GetInventory(model=node.manifest.model_id), timeout=60)
        assert record.payload == b"a signed record"
        assert await code_of(connection, GetInventory(model=ModelId(MODEL))) is RefusalCode.UNKNOWN_MODEL
        load = await connection.ask(GetLoad(), timeout=60)
        assert load.message == Load(queued_requests=0, expected_wait=0.0, rows_done=0, bytes_sent=0)


async def test_what_it_is_asked_for_is_told(node: Node) -> None:
    request = node.request()
    async with node.serving(EXPERT) as connection:
        await connection.ask(request.message, request.payload, timeout=60)
    async with node.serving(PEER) as connection:
        told = await connection.ask(GetDemand(model=node.manifest.model_id), timeout=60)
        assert told.message == Demand(layers=(KEY.layer,), experts=(KEY.expert,), hourly=(round(2 / MEMORY * 3600),))
        assert await code_of(connection, GetDemand(model=ModelId(MODEL))) is RefusalCode.UNKNOWN_MODEL


def test_every_kind_of_request_has_a_service() -> None:
    kinds = {kind for spec in (EXPERT, SHARD, PEER) for kind in spec.answers}
    assert kinds == {RunExperts, GetChunkList, GetChunks, GetHave, OpenBulk, GetInventory, GetLoad, GetDemand}


def test_a_load_beyond_what_the_message_holds_is_cut(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The asking peer would take it for a violation, and ban an honest node for being busy."""
    facts = QueueFacts(requests=1, queued_bytes=1, rows=10**6, seconds_per_row=1.0)
    monkeypatch.setattr(ComputeWorker, "facts", facts)
    assert decode(Load, encode(node.peers._load())).expected_wait == limits.MAX_DEADLINE
