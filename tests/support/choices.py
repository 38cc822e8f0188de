"""Whom a client asks is its policy's choice: tests make that choice beforehand, or find out afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from support.processes import NodeProcess, eventually
from support.waiting import PATIENCE

from moehive.protocol.ids import PeerId
from moehive.swarm.client import Swarm
from moehive.swarm.policy.speed import Speed


def know(swarm: Swarm, model_id: str, nodes: Iterable[NodeProcess]) -> None:
    """Wait until a client knows that these nodes have the model."""
    wanted = {node.peer for node in nodes}
    assert eventually(lambda: wanted <= set(swarm.holders(model_id)), PATIENCE), swarm.holders(model_id)


def forget(swarm: Swarm, model_id: str, node: NodeProcess) -> None:
    """Wait until a client knows that a node has the model no more."""
    assert eventually(lambda: node.peer not in swarm.holders(model_id), PATIENCE), swarm.holders(model_id)


def prefer(swarm: Swarm, model_id: str, node: NodeProcess) -> None:
    """Make the planner believe that a node is the quickest."""
    swarm.stats(model_id).of(PeerId(node.peer)).speed = Speed(answers=1, network=1e-6)


def asked_most(swarm: Swarm, model_id: str, nodes: Iterable[NodeProcess]) -> NodeProcess:
    """The one of some nodes that has answered the most requests."""
    stats = swarm.stats(model_id)
    return max(nodes, key=lambda node: stats.of(PeerId(node.peer)).requests)


def rows_by(swarm: Swarm, model_id: str, node: NodeProcess) -> int:
    """Rows that a node has computed for a client."""
    return swarm.stats(model_id).of(PeerId(node.peer)).rows
