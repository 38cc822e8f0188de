"""Nodes that die, hang or leave in the middle of a generation: the tokens stay transformers'."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.checkpoints import Checkpoints
from support.choices import asked_most, forget, know, rows_by
from support.generation import TOKENS, generate, reference_tokens
from support.processes import NodeProcess, Nodes

from moehive.protocol.errors import ExpertUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.swarm.client import Swarm, join
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.policy.hedging import HedgeSettings
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
EVERY_EXPERT_TWICE = ("*:0-5", "*:0-1,*:4-7", "*:2-3,*:6-7")


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


def load(swarm: Swarm, *nodes: NodeProcess) -> tuple[object, str]:
    """The model, and its id, once all of its nodes are known; the first one founded the swarm."""
    model_id = str(nodes[0].ready()["modelId"])
    model, _ = swarm.load(model_id, dtype=torch.float32)
    know(swarm, model_id, nodes)
    return model, model_id


def test_a_killed_node_changes_nothing_while_every_expert_has_a_holder(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    converted = checkpoints.converted(FAMILY)
    first, second, third = nodes.swarm(converted, *EVERY_EXPERT_TWICE)
    killed: list[NodeProcess] = []
    with join(first.ticket, cache=cache) as swarm:
        model, model_id = load(swarm, first, second, third)

        def kill_whom_it_asks() -> None:  # one of them, because only they hold experts 6 and 7
            killed.append(asked_most(swarm, model_id, (second, third)))
            killed[-1].kill()

        assert generate(model, at_token=5, action=kill_whom_it_asks) == wanted
        assert rows_by(swarm, model_id, killed[-1]) > 0
        # The founder too, which the others and the client were introduced by; its experts are all held once more.
        [left] = {second, third} - set(killed)
        replacement = nodes.start(converted, "--experts", "*:0-5", "--join", left.ticket)
        know(swarm, model_id, [replacement])
        assert generate(model, at_token=5, action=first.kill) == wanted
        assert rows_by(swarm, model_id, left) > 0
        assert rows_by(swarm, model_id, replacement) > 0


def test_a_frozen_node_costs_hedges_and_not_deadlines(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    first, second = nodes.swarm(checkpoints.converted(FAMILY), "*:*", "*:*")
    frozen: list[NodeProcess] = []
    # On a busy machine honest answers are late, too: they must not use up the hedges. A deadline would hang the test.
    settings = CallSettings(answer_timeout=600.0, layer_timeout=600.0, hedge=HedgeSettings(share=1.0, burst=1000.0))
    with join(first.ticket, cache=cache, settings=settings) as swarm:
        model, model_id = load(swarm, first, second)
        won_before: list[int] = []

        def freeze_whom_it_asks() -> None:
            frozen.append(asked_most(swarm, model_id, (first, second)))
            frozen[-1].freeze()
            won_before.append(swarm.stats(model_id).hedges_won)

        # Whom the policy asks after the freeze is its own choice: one that was not asked again showed nothing.
        while not won_before or swarm.stats(model_id).hedges_won == won_before[-1]:
            assert generate(model, at_token=5, action=freeze_whom_it_asks) == wanted
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
    with join(first.ticket, cache=cache, settings=CallSettings(answer_timeout=4.0, layer_timeout=5.0)) as swarm:
        model, model_id = load(swarm, first, second)
        with pytest.raises(ExpertUnavailable) as unavailable:
            generate(model, at_token=5, action=second.kill)
        error = unavailable.value
        assert error.experts
        assert all(expert >= 4 for expert in error.experts)
        assert str(error).startswith(f"layer {error.layer}: no live peer for expert(s) {error.experts[0]}")
        another = nodes.start(directory, "--experts", "*:4-7", "--join", first.ticket)
        know(swarm, model_id, [another])
        assert generate(model) == wanted


def test_a_node_that_leaves_is_not_missed(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    first, second, third = nodes.swarm(checkpoints.converted(FAMILY), *EVERY_EXPERT_TWICE)
    leaving: list[NodeProcess] = []
    with join(first.ticket, cache=cache) as swarm:
        model, model_id = load(swarm, first, second, third)
        assert set(swarm.coverage(model_id)[ExpertKey(0, 4)]) == {first.peer, second.peer}

        def interrupt_whom_it_asks() -> None:  # one of them, because only they hold experts 6 and 7
            leaving.append(asked_most(swarm, model_id, (second, third)))
            leaving[-1].interrupt()

        assert generate(model, at_token=5, action=interrupt_whom_it_asks) == wanted
        leaving[-1].expect_clean_end()
        forget(swarm, model_id, leaving[-1])
        before = rows_by(swarm, model_id, leaving[-1])
        assert generate(model) == wanted
        assert rows_by(swarm, model_id, leaving[-1]) == before > 0
        assert len(wanted) == TOKENS
