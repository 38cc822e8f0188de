"""Damage and strangers, with real processes: refused, and the tokens stay transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.checkpoints import Checkpoints
from support.choices import know, prefer
from support.generation import generate, reference_tokens
from support.processes import NodeProcess, Nodes

from moehive.protocol.errors import ModelUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest
from moehive.protocol.ticket import Ticket
from moehive.swarm.client import join
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


@pytest.fixture
def manifest(checkpoints: Checkpoints) -> Manifest:
    return ConvertedDirectory(checkpoints.converted(FAMILY)).manifest


@pytest.fixture
def damaged(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the converted directory, to be damaged."""
    return Path(copytree(checkpoints.converted(FAMILY), tmp_path / "damaged"))


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tokens(node: NodeProcess, cache: Path, *, first: NodeProcess | None = None) -> list[int]:
    """What a client generates that joins by a node's ticket, and asks another one `first`."""
    with join(node.ticket, cache=cache) as swarm:
        model_id = node.ready()["modelId"]
        model, _ = swarm.load(model_id, dtype=torch.float32)
        if first is not None:
            know(swarm, model_id, [first])
            prefer(swarm, model_id, first)
        return generate(model)


def test_a_flipped_byte_at_the_start_is_not_announced(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, manifest: Manifest, damaged: Path, wanted: list[int]
) -> None:
    bad = manifest.experts[ExpertKey(1, 3)]
    flip(damaged / bad.file)
    first = nodes.start(damaged, "--experts", "all")
    assert first.ready()["expertsHeld"] == len(manifest.experts) - 1
    assert bad.file in first.log
    nodes.start(checkpoints.converted(FAMILY), "--experts", "1:3", "--join", first.ticket).ready()
    assert tokens(first, cache) == wanted


def test_bytes_that_flip_while_a_node_serves_are_dropped_and_asked_for_elsewhere(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, manifest: Manifest, damaged: Path, wanted: list[int]
) -> None:
    good = nodes.start(checkpoints.converted(FAMILY), "--experts", "all")
    bad = nodes.start(damaged, "--experts", "all", "--join", good.ticket)
    assert bad.ready()["expertsHeld"] == len(manifest.experts)
    for shard in manifest.experts.values():
        flip(damaged / shard.file)
    assert tokens(good, cache, first=bad) == wanted
    assert "no longer announced" in bad.log
    assert '"level": "error"' in bad.log


def test_a_flipped_byte_of_the_dense_part_is_neither_served_nor_used(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, manifest: Manifest, damaged: Path, wanted: list[int]
) -> None:
    first = nodes.start(damaged, "--experts", "all")
    first.ready()
    for shard in manifest.skeleton:  # verified when it started, changed since
        flip(damaged / shard.file)
    nodes.start(checkpoints.converted(FAMILY), "--experts", "none", "--join", first.ticket).ready()
    assert tokens(first, cache) == wanted


def test_the_ticket_of_another_swarm_gives_nothing(nodes: Nodes, checkpoints: Checkpoints, cache: Path) -> None:
    node = nodes.start(checkpoints.converted(FAMILY), "--experts", "all")
    forged = replace(Ticket.parse(node.ticket), secret=b"x" * 32)
    with join(forged, cache=cache) as swarm, pytest.raises(ModelUnavailable):
        swarm.load(node.ready()["modelId"], timeout=1.0)
    assert not list(cache.rglob("*.safetensors"))
