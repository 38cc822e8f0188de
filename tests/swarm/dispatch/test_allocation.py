"""Memory of one request: each side holds what arrived once, and copies no tensor on the way."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import torch
from support.swarm_fakes import MODEL, SECRET, identity
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moehive.kernels.routing import group_by_expert
from moehive.node.compute import Work
from moehive.protocol.codec import Message
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import EXPERT, ExpertsDone, OpenBulk, RunExperts
from moehive.swarm.dispatch.asking import _read
from moehive.swarm.dispatch.combine import combine_parts
from moehive.swarm.dispatch.request import ExpertRequest, LayerInput, build_request, tensor_bytes
from moehive.swarm.rpc.client import Answer, Connection
from moehive.swarm.rpc.direct import DirectServer, dial
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

HIDDEN = 2048
SIZES = {"8 KiB": 2, "64 KiB": 16, "512 KiB": 128, "4 MiB": 1024}  # tokens of 4 KiB
WITHIN = 1 << 20  # bytes of buffers that do not depend on the payload: of sockets, TLS and the pieces on their way


def request_of(tokens: int) -> ExpertRequest:
    """All tokens to one expert, in bfloat16."""
    hidden = torch.randn(tokens, HIDDEN).bfloat16()
    call = LayerInput(0, hidden, torch.ones(tokens, 1).bfloat16(), "sum")
    return build_request(MODEL, call, group_by_expert(torch.zeros(tokens, 1, dtype=torch.int64), 1), 60.0)


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operations make anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in old:
                self.bytes += leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES)
def test_tensors_are_views_of_what_is_sent_and_of_what_arrived(tokens: int) -> None:
    hidden = torch.randn(tokens, HIDDEN).bfloat16()
    index, weights = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1).bfloat16()
    per_row = 128 * tokens  # indices, weights, their sorted copies: what does not grow with the hidden size
    with Allocated() as asking:
        call = LayerInput(0, hidden, weights, "sum")
        request = build_request(MODEL, call, group_by_expert(index, 1), 60.0)
    payload = bytearray(b"".join(request.payload))
    with Allocated() as parsing:
        work = Work.parse(request.message, payload)
        sent = tensor_bytes(work.hidden)
    answer = Answer(ExpertsDone(waited=0.0, computed=0.0), bytearray(sent), more=False)
    with Allocated() as reading:
        out = combine_parts(call, [_read(PeerId("peer"), request, answer)])
    assert torch.equal(out, hidden)
    assert max(asking.bytes, parsing.bytes, reading.bytes) < per_row < 0.05 * 2 * HIDDEN * tokens


@asynccontextmanager
async def echo() -> AsyncIterator[Connection]:
    """A direct connection to a node that sends back the rows that it gets."""
    node, client, network = identity(1), identity(2), MemoryNetwork()

    async def handle(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if isinstance(message, OpenBulk):
            await reply(direct.offer(peer, ["/ip4/127.0.0.1/tcp/1"]))
            return
        assert isinstance(message, RunExperts)
        work = Work.parse(message, payload)
        await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(work.hidden),))

    async with (
        MemoryTransport(network, node) as there,
        MemoryTransport(network, client) as here,
        DirectServer(EXPERT, ("127.0.0.1",), 0, agent="node", handle=handle) as direct,
        ConnectionPool(here, EXPERT, SECRET, "client") as pool,
    ):
        await there.serve(EXPERT.name, stream_handler(EXPERT, SECRET, there.peer, "node", handle))
        connection = await dial(await pool.connection(node.peer), "client")
        assert connection is not None
        yield connection
        await connection.close()


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES)
async def test_what_arrives_is_held_once(tokens: int) -> None:
    request = request_of(tokens)
    async with echo() as connection:
        ask = partial(connection.ask, request.message, request.payload, timeout=30.0)
        for _ in range(3):  # buffers that stay
            await ask()
        peak = await peak_of(ask)
        arriving = request.message.request_bytes + request.message.answer_bytes  # both ends are in this process
        assert peak < 1.15 * arriving + WITHIN  # a buffer that grows has an eighth to spare


async def peak_of(ask: Callable[[], Any]) -> int:
    """The most bytes that Python held during one request above those before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await ask()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before
