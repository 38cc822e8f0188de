"""Peers on the in-memory network, for tests of what runs above a transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moehive.protocol.ids import ModelId
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SECRET = b"s" * 32
MODEL = ModelId("ab" * 32)


def identity(number: int) -> Identity:
    """A fixed identity for each number."""
    return Identity.from_seed(bytes([number]) * 32)


@asynccontextmanager
async def member(network: MemoryNetwork, number: int, secret: bytes = SECRET) -> AsyncIterator[Member]:
    """A member of the swarm on `network`."""
    async with MemoryTransport(network, identity(number)) as transport, Member(transport, secret) as joined:
        yield joined
