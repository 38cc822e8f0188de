"""A member turns against a node while others use it: it stays up, its memory bounded, and others get their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import torch
from support.checkpoints import Checkpoints
from support.generation import generate, reference_tokens
from support.processes import NodeProcess, Nodes

from moehive.protocol.errors import PeerError
from moehive.protocol.frames import HEADER
from moehive.protocol.ids import PeerId
from moehive.protocol.limits import MAX_PAYLOAD_BYTES
from moehive.protocol.messages import EXPERT, RunExperts
from moehive.protocol.session import Admission, ClientSession
from moehive.protocol.ticket import Ticket
from moehive.swarm.client import join
from moehive.swarm.identity import Identity
from moehive.swarm.member import is_genuine
from moehive.swarm.transport.base import Stream
from moehive.swarm.transport.hivemind import HivemindTransport

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
STREAMS = 400  # of the attack; each costs the daemons more than it costs us
HELD = 24  # streams on which a large request never ends


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


class Attacker:
    """A member with a ticket and bad intentions."""

    def __init__(self, ticket: str, victim: str) -> None:
        self._ticket = Ticket.parse(ticket)
        self._victim = PeerId(victim)

    async def run(self, attack: Callable[[Attacker, HivemindTransport], Awaitable[None]]) -> None:
        transport = HivemindTransport(
            Identity.ephemeral(), bootstrap=self._ticket.peers, client_only=True, record_validator=is_genuine
        )
        async with transport:
            await attack(self, transport)

    async def admitted(self, transport: HivemindTransport) -> tuple[Stream, ClientSession]:
        """A stream on which the hello is through."""
        stream = await transport.open(self._victim, EXPERT.name)
        session = ClientSession(EXPERT, Admission(self._ticket.secret, transport.peer, self._victim), "attacker")
        await stream.write(*session.send_hello())
        session.receive(await stream.read(1 << 16))
        return stream, session

    async def open(self, transport: HivemindTransport) -> Stream:
        return await transport.open(self._victim, EXPERT.name)


async def malformed(attacker: Attacker, transport: HivemindTransport) -> None:
    """Frames that are none, before and after the hello; ids used twice; replies to nobody."""
    run = RunExperts.KIND
    bad = [
        bytes(64),
        b"\xff" * 64,
        HEADER.pack(1, run, 0, 1, 0xFFFFFFFF, 0xFFFFFFFF),
        HEADER.pack(1, run, 0, 1, 4, MAX_PAYLOAD_BYTES + 1) + b"meta",
        HEADER.pack(1, run, 0, 1, 4, 0) + b"\x84\xa1\xc1\xc1",
        HEADER.pack(1, 49, 0, 1, 1, 0) + b"\x80",
        HEADER.pack(1, run, 7, 1, 1, 0) + b"\x80",
    ]
    for data in bad:
        fresh = await attacker.open(transport)
        await fresh.write(data)
        await fresh.read(1 << 16)
        await fresh.close()
        stream, _ = await attacker.admitted(transport)
        await stream.write(data)
        await stream.read(1 << 16)
        await stream.close()


async def many_streams(attacker: Attacker, transport: HivemindTransport) -> None:
    """Opened and left."""
    opened = []
    for _ in range(STREAMS):
        try:
            opened.append(await attacker.open(transport))
        except PeerError:
            continue
    await asyncio.gather(*(stream.close() for stream in opened))


async def never_finishing(attacker: Attacker, transport: HivemindTransport) -> None:
    """Half a large request on as many streams as one may have, and on more."""
    opened = []
    for _ in range(HELD):
        try:
            stream, _ = await attacker.admitted(transport)
            await stream.write(HEADER.pack(1, RunExperts.KIND, 0, 1, 200, MAX_PAYLOAD_BYTES), bytes(8 << 20))
            opened.append(stream)
        except PeerError:
            continue
    await asyncio.gather(*(stream.close() for stream in opened))


@pytest.mark.parametrize("attack", [malformed, many_streams, never_finishing])
def test_others_are_served_meanwhile(
    nodes: Nodes,
    checkpoints: Checkpoints,
    cache: Path,
    wanted: list[int],
    attack: Callable[[Attacker, HivemindTransport], Awaitable[None]],
) -> None:
    node = nodes.start(checkpoints.converted(FAMILY), "--experts", "all")
    attacker = Attacker(node.ticket, node.peer)
    with join(node.ticket, cache=cache) as swarm:
        model, _ = swarm.load(node.ready()["modelId"], dtype=torch.float32)
        assert generate(model) == wanted
        before = memory(node)
        found: list[list[int]] = []

        async def both() -> None:
            attacking = asyncio.create_task(attacker.run(attack))
            while not attacking.done():
                found.append(await asyncio.to_thread(generate, model))
            await attacking

        asyncio.run(both())
        assert found
        assert all(tokens == wanted for tokens in found)
        assert memory(node) - before < 300 << 20
    node.stop()


def memory(node: NodeProcess) -> int:
    """Resident bytes of a node, without its daemon."""
    return int(psutil.Process(node.pid).memory_info().rss)
