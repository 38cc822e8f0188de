"""Nodes that die, hang or leave in the middle of a generation: the tokens stay transformers'."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.checkpoints import Checkpoints
from support.generation import TOKENS, generate, reference_tokens
from support.processes import NodeProcess, Nodes, eventually

from moehive.protocol.errors import ExpertUnavailable
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.swarm.client import Swarm, join
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
EVERY_EXPERT_TWICE = ("*:0-5", "*:0-1,*:4-7", "*:2-3,*:6-7")


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


def model_of(swarm: Swarm, node: NodeProcess) -> object:
    model, _ = swarm.load(node.ready()["modelId"], dtype=torch.float32)
    return model


def rows_by(swarm: Swarm, asked: NodeProcess, founder: NodeProcess) -> int:
    """Rows that a node has computed for this client."""
    return swarm.stats(founder.ready()["modelId"]).peers[PeerId(asked.peer)].rows


def test_a_killed_node_changes_nothing_while_every_expert_has_a_holder(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    first, second, third = nodes.swarm(checkpoints.converted(FAMILY), *EVERY_EXPERT_TWICE)
    with join(first.ticket, cache=cache) as swarm:
        model = model_of(swarm, first)
        assert generate(model, at_token=5, action=second.kill) == wanted
        assert rows_by(swarm, second, first) > 0
        # The founder too, which the others and the client were introduced by; its experts are all held once more.
        replacement = nodes.start(checkpoints.converted(FAMILY), "--experts", "*:0-1,*:4-5", "--join", third.ticket)
        replacement.ready()
        assert generate(model, at_token=5, action=first.kill) == wanted
        assert rows_by(swarm, third, first) > 0
        assert rows_by(swarm, replacement, first) > 0


def test_a_frozen_node_costs_hedges_and_not_deadlines(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    first, second = nodes.swarm(checkpoints.converted(FAMILY), "*:*", "*:*")
    frozen: list[NodeProcess] = []
    with join(first.ticket, cache=cache, settings=CallSettings(answer_timeout=600.0, layer_timeout=600.0)) as swarm:
        model, model_id = model_of(swarm, first), first.ready()["modelId"]

        def freeze_whom_it_asks() -> None:
            asked = swarm.stats(model_id).peers
            frozen.append(max((first, second), key=lambda node: asked[PeerId(node.peer)].requests))
            frozen[-1].freeze()

        # Whom the policy asks after the freeze is its own choice: one that was not asked again showed nothing.
        while swarm.stats(model_id).hedges_won == 0:
            assert generate(model, at_token=5, action=freeze_whom_it_asks) == wanted  # a deadline would hang the test
            frozen[-1].thaw()
        assert generate(model) == wanted


def test_without_a_holder_the_error_names_the_experts_and_the_model_works_again_with_a_new_node(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, tmp_path: Path, wanted: list[int]
) -> None:
    directory, half = checkpoints.converted(FAMILY), tmp_path / "half"
    copytree(directory, half)
    for key, shard in ConvertedDirectory(half).manifest.experts.items():
        if key.expert >= 4:
            (half / shard.file).unlink()  # nobody but the second node has its bytes
    first = nodes.start(half, "--experts", "*:0-3")
    second = nodes.start(directory, "--experts", "*:4-7", "--join", first.ticket)
    second.ready()
    with join(first.ticket, cache=cache, settings=CallSettings(answer_timeout=1.0, layer_timeout=2.0)) as swarm:
        model = model_of(swarm, first)
        with pytest.raises(ExpertUnavailable) as unavailable:
            generate(model, at_token=5, action=second.kill)
        error = unavailable.value
        assert error.experts
        assert all(expert >= 4 for expert in error.experts)
        assert str(error).startswith(f"layer {error.layer}: no live peer for expert(s) {error.experts[0]}")
        nodes.start(directory, "--experts", "*:4-7", "--join", first.ticket).ready()
        assert generate(model) == wanted


def test_a_node_that_leaves_is_not_missed(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    first, second, third = nodes.swarm(checkpoints.converted(FAMILY), *EVERY_EXPERT_TWICE)
    model_id = first.ready()["modelId"]
    with join(first.ticket, cache=cache) as swarm:
        model = model_of(swarm, first)
        assert set(swarm.holders(model_id)) == {first.peer, second.peer, third.peer}
        assert set(swarm.coverage(model_id)[ExpertKey(0, 4)]) == {first.peer, second.peer}
        assert generate(model, at_token=5, action=second.interrupt) == wanted
        second.expect_clean_end()
        assert eventually(lambda: set(swarm.holders(model_id)) == {first.peer, third.peer}, timeout=5)
        before = rows_by(swarm, second, first)
        assert generate(model) == wanted
        assert rows_by(swarm, second, first) == before > 0
        assert len(wanted) == TOKENS
