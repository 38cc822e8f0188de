"""Pairs of transports that can reach each other, on every carrier."""

import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from moehive.swarm.identity import Identity
from moehive.swarm.transport.base import Record, Transport
from moehive.swarm.transport.hivemind import HivemindTransport
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

_names = itertools.count()


@dataclass(frozen=True)
class Pair:
    """`node` serves; `client` opens. `name`: a protocol (and table key) that no other test uses."""

    node: Transport
    client: Transport
    name: str = ""


def not_forged(_key: bytes, _subkey: str, record: Record) -> bool:
    """A validator to recognise."""
    return record.value != b"forged"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def memory_pair() -> AsyncIterator[Pair]:
    network = MemoryNetwork(record_validator=not_forged)
    async with (
        MemoryTransport(network, Identity.ephemeral()) as node,
        MemoryTransport(network, Identity.ephemeral()) as client,
    ):
        yield Pair(node, client)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hivemind_pair() -> AsyncIterator[Pair]:
    async with (
        HivemindTransport(Identity.ephemeral(), record_validator=not_forged) as node,
        HivemindTransport(
            Identity.ephemeral(), bootstrap=node.addresses, client_only=True, record_validator=not_forged
        ) as client,
    ):
        yield Pair(node, client)


@pytest.fixture(params=["memory", pytest.param("hivemind", marks=pytest.mark.swarm)])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The same pair for all tests of a module, with a name of its own for each test."""
    shared: Pair = request.getfixturevalue(f"{request.param}_pair")
    return Pair(shared.node, shared.client, f"/test/{next(_names)}/1.0.0")
