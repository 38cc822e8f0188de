"""Half an hour of peers that come and go, in virtual time: every answer right, none late, nothing piles up."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import torch
from support.swarm_fakes import MODEL, SECRET, identity
from support.toy_experts import EXPERTS, LAYER, Layer, World, honest, tell_load
from support.virtual_time import run_virtually

from moehive.protocol.codec import Message
from moehive.protocol.errors import SwarmError
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.messages import EXPERT, PEER
from moehive.swarm.announcer import Announcer
from moehive.swarm.directory import Directory
from moehive.swarm.dispatch.caller import CallSettings, ExpertCaller
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.tasks import task_group
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

DURATION = 1800.0  # seconds
PAUSE = 1.5  # between two calls of the client
PEOPLE = 12  # identities that come and go
AT_A_TIME = 6
EVERY = 4.0  # seconds between two that leave
SETTINGS = CallSettings(answer_timeout=5.0, layer_timeout=30.0, spot_checks=0.0)


@dataclass
class Churn:
    """The peers that are there, and how they leave."""

    network: MemoryNetwork
    clock: Callable[[], float]
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    there: dict[int, tuple[frozenset[int], asyncio.Event]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=lambda: {"politely": 0, "killed": 0, "frozen": 0})

    async def run(self) -> None:
        async with task_group() as group:
            for number in range(1, AT_A_TIME + 1):
                await self.start(group, number)
            while True:
                await asyncio.sleep(EVERY)
                absent = [number for number in range(1, PEOPLE + 1) if number not in self.there]
                await self.start(group, self.chance.choice(absent))
                if leaving := self.dispensable():
                    self.there.pop(self.chance.choice(leaving))[1].set()

    def dispensable(self) -> list[int]:
        """Who may leave such that every expert is still held by somebody."""
        return [
            number
            for number in self.there
            if len(frozenset().union(*(held for other, (held, _) in self.there.items() if other != number))) == EXPERTS
        ]

    async def start(self, group: asyncio.TaskGroup, number: int) -> None:
        held = frozenset(self.chance.sample(range(EXPERTS), EXPERTS // 2))
        if len(self.there) < 2:  # the first two: between them, everything
            held = frozenset(range(EXPERTS // 2)) if not self.there else frozenset(range(EXPERTS // 2, EXPERTS))
        leave, ready = asyncio.Event(), asyncio.Event()
        group.create_task(self.live(number, held, leave, ready))
        await ready.wait()
        self.there[number] = held, leave

    async def live(self, number: int, held: frozenset[int], leave: asyncio.Event, ready: asyncio.Event) -> None:
        """One peer, from coming to going."""
        me, manner = identity(number), self.chance.choice(list(self.left))
        pace = self.chance.uniform(0.02, 0.2)

        async def answer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
            await asyncio.sleep(self.chance.expovariate(1 / pace))
            await honest(peer, message, payload, reply)

        async with MemoryTransport(self.network, me) as transport:
            announcer = Announcer(transport, me, SECRET, MODEL, wall_clock=self.clock)
            announcer.hold(frozenset(ExpertKey(LAYER, expert) for expert in held), skeleton=False)
            await transport.serve(EXPERT.name, stream_handler(EXPERT, SECRET, me.peer, "peer", answer))
            await transport.serve(PEER.name, stream_handler(PEER, SECRET, me.peer, "peer", tell_load))
            renewing = asyncio.create_task(announcer.run())
            await asyncio.sleep(0.01)  # it is announced
            ready.set()
            await leave.wait()
            renewing.cancel()
            self.left[manner] += 1
            if manner == "politely":
                await asyncio.sleep(0.01)  # two announcements at the same instant would be one
                await announcer.withdraw()
                await asyncio.sleep(1.0)
            elif manner == "killed":
                with self.network.dropping_connections(me.peer):
                    await asyncio.sleep(0)
            else:
                with self.network.partitioned(me.peer):
                    await asyncio.sleep(EVERY / 2)


@asynccontextmanager
async def client(network: MemoryNetwork, clock: Callable[[], float]) -> AsyncIterator[ExpertCaller]:
    standings = Standings(clock)
    async with (
        MemoryTransport(network, identity(99)) as transport,
        ConnectionPool(transport, EXPERT, SECRET, "client", clock=clock) as experts,
        ConnectionPool(transport, PEER, SECRET, "client", clock=clock) as peers,
        task_group() as group,
    ):

        def announced(peer: PeerId) -> None:  # as a member does
            standings.returned(peer)
            experts.dial_at_once(peer)
            peers.dial_at_once(peer)

        directory = Directory(transport, SECRET, MODEL, standings, on_announcement=announced, wall_clock=clock)
        world = World(network, transport, standings, directory, experts, peers, clock)
        caller = ExpertCaller(MODEL, directory, world, standings, SETTINGS, clock=clock)
        tasks = [group.create_task(directory.run()), group.create_task(caller.watch())]
        yield caller
        for task in tasks:
            task.cancel()


async def half_an_hour() -> None:
    clock = asyncio.get_running_loop().time
    network = MemoryNetwork(clock=clock)
    churn, calls, slowest, objects = Churn(network, clock), 0, 0.0, []
    layers = [Layer(tokens=1), Layer(tokens=3, form="rows")]
    async with task_group() as group, client(network, clock) as caller:
        churning = group.create_task(churn.run())
        while clock() < DURATION:
            started, layer = clock(), layers[calls % len(layers)]
            try:
                torch.testing.assert_close(await layer.run(caller), layer.expected)
            except SwarmError as error:
                raise AssertionError(f"at {started:.0f} s, with {len(churn.there)} peers") from error
            calls, slowest = calls + 1, max(slowest, clock() - started)
            if len(objects) < (clock() / DURATION - 0.25) * 8:  # six times, from a quarter on
                gc.collect()
                objects.append(len(gc.get_objects()))
            await asyncio.sleep(PAUSE)
        churning.cancel()
    assert calls > DURATION / (2 * PAUSE)
    assert min(churn.left.values()) > 100
    assert slowest < 2 * SETTINGS.answer_timeout
    assert max(objects[3:]) < 1.3 * max(objects[:3])  # nothing piles up


def test_half_an_hour_of_churn() -> None:
    gc.collect()
    gc.freeze()  # what is there already is not counted
    try:
        run_virtually(half_an_hour())
    finally:
        gc.unfreeze()
