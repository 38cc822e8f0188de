"""One of three holders misbehaves, or the network does: the tokens are the reference's as long as any holder lives."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.choices import forget, know, prefer
from support.faulty_node import RETRY_AFTER
from support.generation import generate, reference_tokens
from support.links import Link
from support.processes import NodeProcess, Nodes, eventually
from support.waiting import PATIENCE

from moehive.protocol.errors import ExpertUnavailable
from moehive.protocol.ids import PeerId
from moehive.swarm.client import join
from moehive.swarm.dispatch.caller import CallSettings

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
SETTINGS = CallSettings(answer_timeout=5.0, layer_timeout=60.0)


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


def swarm_with(nodes: Nodes, converted: Path, fault: str) -> tuple[NodeProcess, NodeProcess, NodeProcess]:
    """Three nodes that hold everything: the founder, the one with the fault, and one more."""
    founder = nodes.start(converted, "--experts", "all")
    bad = nodes.start(converted, "--experts", "all", "--join", founder.ticket, fault=fault)
    return founder, bad, nodes.start(converted, "--experts", "all", "--join", founder.ticket)


@pytest.mark.parametrize("fault", ["slow", "garbage", "late", "refuse", "vanish"])
def test_a_bad_holder_costs_time_only(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int], fault: str
) -> None:
    founder, bad, good = swarm_with(nodes, checkpoints.converted(FAMILY), fault)
    with join(founder.ticket, cache=cache, settings=SETTINGS) as swarm:
        model_id = founder.ready()["modelId"]
        model, _ = swarm.load(model_id, dtype=torch.float32)
        know(swarm, model_id, (founder, bad, good))
        stats, began = swarm.stats(model_id), time.monotonic()
        while stats.hedges + stats.retries == 0:  # until it was asked, and did not do
            prefer(swarm, model_id, bad)
            assert generate(model) == wanted
        # After a failure it is passed over, for as long as it asked at least.
        took = time.monotonic() - began
        assert stats.peers[PeerId(bad.peer)].failures <= 2 * (1 + took / RETRY_AFTER)


def test_a_plausible_liar_is_found_banned_and_reported(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    founder, bad, good = swarm_with(nodes, checkpoints.converted(FAMILY), "lie")
    settings = CallSettings(answer_timeout=5.0, spot_checks=1.0)
    with join(founder.ticket, cache=cache, settings=settings) as swarm:
        model_id = founder.ready()["modelId"]
        model, _ = swarm.load(model_id, dtype=torch.float32)
        know(swarm, model_id, (founder, bad, good))
        prefer(swarm, model_id, bad)
        generate(model)  # what it says may be wrong until the liar is found
        assert eventually(lambda: bool(swarm.liars(model_id)), PATIENCE)
        [report] = swarm.liars(model_id)
        assert report.peer == bad.peer
        assert report.error == pytest.approx(0.1, rel=0.1)
        assert 1 <= report.first_pass <= report.last_pass
        assert generate(model) == wanted
        forget(swarm, model_id, bad)


def test_a_liar_without_a_second_holder_is_found_by_one_expert(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path
) -> None:
    only = nodes.start(checkpoints.converted(FAMILY), "--experts", "all", fault="lie")
    settings = CallSettings(layer_timeout=5.0, spot_checks=1.0)
    with join(only.ticket, cache=cache, settings=settings) as swarm:
        model_id = only.ready()["modelId"]
        model, _ = swarm.load(model_id, dtype=torch.float32)
        with suppress(ExpertUnavailable):  # once it is banned
            generate(model)
        assert eventually(lambda: bool(swarm.liars(model_id)), PATIENCE)
        [report] = swarm.liars(model_id)
        assert (report.peer, len(report.experts)) == (only.peer, 1)
        counts = swarm.check_counts(model_id)
        assert counts.checked >= 1
        assert counts is not swarm.check_counts(model_id)


def test_a_partition_that_heals(nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]) -> None:
    converted = checkpoints.converted(FAMILY)
    founder = nodes.start(converted, "--experts", "*:0-3")
    with Link(rtt=0.001) as link:
        far = nodes.start(converted, "--experts", "*:4-7", "--join", founder.ticket, *link.options)
        far.ready()
        with join(founder.ticket, cache=cache, settings=SETTINGS) as swarm:
            model_id = founder.ready()["modelId"]
            model, _ = swarm.load(model_id, dtype=torch.float32)
            know(swarm, model_id, (founder, far))

            stats = swarm.stats(model_id)

            def heal_once_it_was_felt(retries: int) -> None:
                assert eventually(lambda: stats.retries > retries, PATIENCE)
                link.heal()

            def cut() -> None:
                link.cut()
                healing.append(threading.Thread(target=heal_once_it_was_felt, args=(stats.retries,)))
                healing[0].start()  # the generation goes on meanwhile

            healing: list[threading.Thread] = []
            assert generate(model, at_token=5, action=cut) == wanted
            healing[0].join()


def test_all_holders_of_an_expert_gone_and_one_returning(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    converted = checkpoints.converted(FAMILY)
    founder, second = nodes.swarm(converted, "*:0-3", "*:4-7")
    with join(founder.ticket, cache=cache, settings=SETTINGS) as swarm:
        model_id = founder.ready()["modelId"]
        model, _ = swarm.load(model_id, dtype=torch.float32)
        know(swarm, model_id, (founder, second))

        def replace() -> None:
            second.kill()
            nodes.start(converted, "--experts", "*:4-7", "--join", founder.ticket, home=second.home)

        assert generate(model, at_token=5, action=replace) == wanted
        assert swarm.stats(model_id).retries > 0
