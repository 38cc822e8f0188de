"""Peers on the in-memory network, for tests of what runs above a transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode, ShardUnavailable
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.manifest import ShardEntry
from moehive.protocol.messages import PEER, SHARD, Demand, GetDemand, GetInventory, Inventory
from moehive.swarm.announcer import Announcer
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member
from moehive.swarm.rpc.server import Refusal, Reply, stream_handler
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.supply import Shelf, answers
from moehive.swarm.transport.base import Transport
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SECRET = b"s" * 32
MODEL = ModelId("ab" * 32)


def identity(number: int) -> Identity:
    """A fixed identity for each number."""
    return Identity.from_seed(bytes([number]) * 32)


@asynccontextmanager
async def supplying(network: MemoryNetwork, by: Identity, shelf: Shelf) -> AsyncIterator[MemoryTransport]:
    """A peer that supplies objects, by streams only."""

    async def answer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        for each in answers(shelf, message):
            await reply(each.message, (each.payload,), more=each.more)

    async with MemoryTransport(network, by) as transport:
        await transport.serve(SHARD.name, stream_handler(SHARD, SECRET, transport.peer, "supplier", answer))
        yield transport


@asynccontextmanager
async def member(network: MemoryNetwork, number: int, secret: bytes = SECRET) -> AsyncIterator[Member]:
    """A member of the swarm on `network`."""
    async with MemoryTransport(network, identity(number)) as transport, Member(transport, secret) as joined:
        yield joined


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def announce(
    transport: Transport,
    by: Identity,
    held: Iterable[ExpertKey] = (),
    *,
    skeleton: bool = False,
    complete: bool = False,
    loading: bool = False,
    model: ModelId = MODEL,
    clock: Callable[[], float] = time.time,
) -> None:
    """Store an announcement of `by`, signed by it."""
    announcer = Announcer(transport, by, SECRET, model, wall_clock=clock)
    announcer.hold(frozenset(held), skeleton=skeleton, complete=complete, loading=loading)
    assert await announcer.announce()


class Holder:
    """A peer that announces experts of a model, confirms it when it is asked, and says what it is asked for."""

    def __init__(self, transport: Transport, by: Identity, model: ModelId, demand: Demand | None = None) -> None:
        self._transport = transport
        self._announcer = Announcer(transport, by, SECRET, model)
        self._demand = demand  # None: it does not say
        self._answers = False

    async def announce(self, held: Iterable[ExpertKey], *, skeleton: bool = False) -> None:
        """Store what it holds now, and answer from now on."""
        self._announcer.hold(frozenset(held), skeleton=skeleton)
        assert await self._announcer.announce()
        if not self._answers:
            handler = stream_handler(PEER, SECRET, self._transport.peer, "holder", self._answer)
            await self._transport.serve(PEER.name, handler)
            self._answers = True

    async def _answer(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if isinstance(message, GetInventory):
            await reply(Inventory(), (self._announcer.record().value,))
        elif self._demand is None:
            raise Refusal(RefusalCode.UNKNOWN_MODEL)
        else:
            assert isinstance(message, GetDemand)
            await reply(self._demand)


def fetch_from(
    source: ConvertedDirectory, fails: Callable[[], bool] = lambda: False
) -> Callable[[ShardEntry, memoryview, float], Awaitable[None]]:
    """Downloads from a swarm that has all of a model; see dispatch/weights.py, FetchShard."""

    async def fetch(shard: ShardEntry, buffer: memoryview, deadline: float) -> None:
        await asyncio.sleep(0)
        if fails():
            raise ShardUnavailable(shard.file)
        buffer[:] = (source.root / shard.file).read_bytes()

    return fetch
