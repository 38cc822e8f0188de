"""Peers on the in-memory network that run toy experts, honestly or not, and a client that calls them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from support.swarm_fakes import MODEL, SECRET, announce, identity
from torch import Tensor

from moehive.kernels.routing import Assignment, group_by_expert
from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.messages import EXPERT, PEER, ExpertsDone, GetLoad, Load, RunExperts
from moehive.swarm.directory import Directory
from moehive.swarm.dispatch.caller import CallSettings, ExpertCaller, LastResort
from moehive.swarm.dispatch.combine import combine_parts
from moehive.swarm.dispatch.request import LayerInput, parse_request, tensor_bytes
from moehive.swarm.identity import Identity
from moehive.swarm.policy.hedging import HedgeSettings
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Refusal, Reply, RequestHandler, stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

LAYER, EXPERTS, HIDDEN = 3, 8, 4
# In the order of their ids: of peers about which nothing is known, the planner asks the greatest.
FIRST, SECOND, THIRD = sorted((identity(n) for n in (1, 2, 3)), key=lambda one: one.peer, reverse=True)


async def honest(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Expert e multiplies by e + 1."""
    assert isinstance(message, RunExperts)
    await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(answer_to(message, payload)),))


def answer_to(message: RunExperts, payload: bytearray) -> Tensor:
    hidden, token, weights = parse_request(message, payload)
    factor = (torch.tensor(message.experts) + 1.0).repeat_interleave(torch.tensor(message.counts))  # [R]
    rows = hidden[token] * factor[:, None]  # [R, H]
    if weights is None:
        return rows
    return torch.zeros_like(hidden).index_add_(0, token, rows * weights[:, None])  # [T, H]


def refusing(code: RefusalCode, times: int = 10**9, **options: float) -> RequestHandler:
    """Refuses so many requests, then answers."""
    left = times

    async def handle(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise Refusal(code, "because", **options)
        await honest(peer, message, payload, reply)

    return handle


async def tell_load(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Is not busy."""
    assert isinstance(message, GetLoad)
    await reply(Load(queued_requests=0, expected_wait=0.0, rows_done=0, bytes_sent=0))


async def lying(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Answers with something plausible: a tenth too much."""
    assert isinstance(message, RunExperts)
    await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(answer_to(message, payload) * 1.1),))


async def garbage(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Answers with NaN in one place."""
    assert isinstance(message, RunExperts)
    answer = answer_to(message, payload)
    answer[-1, -1] = float("nan")
    await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(answer),))


async def never(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Takes the request and does not answer."""
    await asyncio.Event().wait()


async def one_row_short(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
    """Answers with fewer bytes than were asked for."""
    assert isinstance(message, RunExperts)
    await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(answer_to(message, payload)[1:]),))


@dataclass
class World:
    """A client, and the network on which it finds peers."""

    network: MemoryNetwork
    client: MemoryTransport
    standings: Standings
    directory: Directory
    experts: ConnectionPool
    peers: ConnectionPool
    clock: Callable[[], float]

    def caller(
        self,
        *,
        answer_timeout: float = 5.0,
        layer_timeout: float = 10.0,
        hedge: HedgeSettings | None = None,
        spot_checks: float = 0.0,
        last_resort: LastResort | None = None,
    ) -> ExpertCaller:
        settings = CallSettings(answer_timeout, layer_timeout, hedge, spot_checks)
        return ExpertCaller(
            MODEL, self.directory, self, self.standings, settings, last_resort=last_resort, clock=self.clock
        )

    @asynccontextmanager
    async def peer(self, key: Identity, handle: RequestHandler, experts: Sequence[int]) -> AsyncIterator[PeerId]:
        """A peer that announces some experts and answers with `handle`."""
        async with MemoryTransport(self.network, key) as transport:
            await transport.serve(EXPERT.name, stream_handler(EXPERT, SECRET, transport.peer, "peer", handle))
            await transport.serve(PEER.name, stream_handler(PEER, SECRET, transport.peer, "peer", tell_load))
            await announce(transport, key, [ExpertKey(LAYER, expert) for expert in experts])
            await self.directory.refresh()
            yield transport.peer


@asynccontextmanager
async def toy_world() -> AsyncIterator[World]:
    """A network with a client on it and nobody else; the event loop's clock is everybody's."""
    clock = asyncio.get_running_loop().time
    network = MemoryNetwork()
    standings = Standings(clock)
    async with (
        MemoryTransport(network, identity(9)) as client,
        ConnectionPool(client, EXPERT, SECRET, "client", clock=clock) as experts,
        ConnectionPool(client, PEER, SECRET, "client", clock=clock) as peers,
    ):
        directory = Directory(client, SECRET, MODEL, standings)
        yield World(network, client, standings, directory, experts, peers, clock)


class Layer:
    """One call of a layer, with what must come out."""

    def __init__(self, tokens: int = 3, form: str = "sum", experts: Sequence[int] = range(EXPERTS)) -> None:
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(tokens, HIDDEN, generator=generator)  # [T, H]
        weights = torch.rand(tokens, len(experts), generator=generator)  # [T, K]
        index = torch.tensor([list(experts)] * tokens)  # [T, K]
        self.call = LayerInput(LAYER, hidden, weights, form)
        self.assignments: list[Assignment] = group_by_expert(index, EXPERTS)
        self.expected = hidden * (weights * (index + 1)).sum(1, keepdim=True)  # [T, H]

    async def run(self, caller: ExpertCaller) -> Tensor:
        return combine_parts(self.call, await caller.run(self.call, self.assignments))

    async def check(self, caller: ExpertCaller) -> None:
        torch.testing.assert_close(await self.run(caller), self.expected)
