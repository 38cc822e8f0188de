"""A member turns against a node while others use it: it stays up, its memory bounded, and others get their tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import torch
from support.attacks import (
    Attack,
    attacker,
    declared_lengths,
    malformed,
    many_streams,
    never_finishing,
    replayed_ids,
    silent_strangers,
)
from support.checkpoints import Checkpoints
from support.generation import generate, reference_tokens
from support.processes import NodeProcess, Nodes

from moehive.protocol.limits import MAX_STREAMS_PER_PEER
from moehive.swarm.client import join
from moehive.swarm.rpc.direct import MAX_UNADMITTED

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
ATTACKS = [
    pytest.param(malformed, id="malformed frames"),
    pytest.param(declared_lengths, id="declared lengths"),
    pytest.param(many_streams(400), id="many streams"),  # scripts/bench/hostile.py opens 10,000
    pytest.param(never_finishing(MAX_STREAMS_PER_PEER + 8), id="never finishing"),
    pytest.param(replayed_ids(4), id="replayed ids"),
    pytest.param(silent_strangers(4 * MAX_UNADMITTED), id="silent strangers"),
]


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


@pytest.mark.parametrize("attack", ATTACKS)
def test_others_are_served_meanwhile(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int], attack: Attack
) -> None:
    node = nodes.start(checkpoints.converted(FAMILY), "--experts", "all")
    with join(node.ticket, cache=cache) as swarm:
        model, _ = swarm.load(node.ready()["modelId"], dtype=torch.float32)
        assert generate(model) == wanted
        before = memory(node)
        found: list[list[int]] = []

        async def attacking() -> None:
            async with attacker(node.ticket, node.peer) as one:
                await attack(one)

        async def both() -> None:
            running = asyncio.create_task(attacking())
            while not running.done():
                found.append(await asyncio.to_thread(generate, model))
            await running

        asyncio.run(both())
        assert found
        assert all(tokens == wanted for tokens in found)
        assert memory(node) - before < 300 << 20
    node.stop()


def memory(node: NodeProcess) -> int:
    """Resident bytes of a node, without its daemon."""
    return int(psutil.Process(node.pid).memory_info().rss)
