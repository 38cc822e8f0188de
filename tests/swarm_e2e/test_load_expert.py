"""One expert from a real swarm: exact, from memory or store, within its deadline; and room made by asking the swarm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.processes import Nodes

import moehive.swarm
from moehive.node.cli.app import run
from moehive.protocol.errors import ConfigError, ShardUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.swarm.client import join
from moehive.swarm.paths import Paths
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "mixtral"


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_expert_from_peers_from_the_store_and_from_a_seed(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path
) -> None:
    directory = checkpoints.converted(FAMILY)
    manifest = ConvertedDirectory(directory).manifest
    node = nodes.start(directory, "--experts", "*:0-3")
    model_id = node.ready()["modelId"]
    store = ContentStore(cache / "store", 1 << 30)
    with join(node.ticket, cache=cache, seeds=[str(checkpoints.source(FAMILY))]) as swarm:
        for layer, expert in ((0, 1), (1, 3)):
            wanted = moehive.swarm.load_expert(directory, layer, expert)
            assert equal(swarm.load_expert(model_id, layer, expert, timeout=60.0), wanted)
        assert not store.has(manifest.experts[ExpertKey(0, 1)].hash), "it went to memory only"
        halves = swarm.load_expert(model_id, 0, 2, dtype=torch.float64, timeout=60.0)
        assert all(tensor.dtype is torch.float64 for tensor in halves.values())
        with pytest.raises(ConfigError, match="no expert 99"):
            swarm.load_expert(model_id, 0, 99)
        node.kill()
        wanted = moehive.swarm.load_expert(directory, 1, 5)
        assert equal(swarm.load_expert(model_id, 1, 5, timeout=60.0), wanted), "nobody but the seed is left"
    with join(nodes.start(directory, "--experts", "none").ticket, cache=cache) as swarm:
        shard = manifest.experts[ExpertKey(0, 1)]
        store.put(directory / shard.file)
        assert equal(swarm.load_expert(model_id, 0, 1, timeout=60.0), moehive.swarm.load_expert(directory, 0, 1))


def test_a_deadline_holds(nodes: Nodes, checkpoints: Checkpoints, cache: Path) -> None:
    directory = checkpoints.converted(FAMILY)
    node = nodes.start(directory, "--experts", "all")
    model_id = node.ready()["modelId"]
    with join(node.ticket, cache=cache) as swarm:
        swarm.load_expert(model_id, 0, 0, timeout=60.0)
        node.freeze()
        with pytest.raises(ShardUnavailable, match="experts/00001/00001"):
            swarm.load_expert(model_id, 1, 1, timeout=1.0)  # for ever, were it not for the deadline
        node.thaw()


def test_prune_asks_the_swarm_and_believes_only_who_answers(
    nodes: Nodes, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints.converted(FAMILY)
    two = checkpoints.some(FAMILY, tmp_path / "two", lambda key: key in ((0, 0), (0, 1)))
    first = nodes.run("publish", directory, "--json")
    other = nodes.start(two, "--experts", "0:0-1", "--no-skeleton", "--join", first.ticket)
    fetched = nodes.run("fetch", first.ready()["modelId"], "--join", first.ticket, "--json")
    fetched.ready()
    fetched.expect_clean_end()
    ticket = other.ticket
    monkeypatch.setenv("MOEHIVE_HOME", str(fetched.home))
    store = ContentStore(Paths.of({"MOEHIVE_HOME": str(fetched.home)}).store, 1 << 30)
    before = dict(store.objects())
    first.kill()  # its announcement lives on for a minute
    assert run(["store", "prune", "--join", ticket]) == 1
    gone = before.keys() - store.objects().keys()
    manifest = ConvertedDirectory(directory).manifest
    assert gone <= {manifest.model_id, *(manifest.experts[ExpertKey(0, expert)].hash for expert in (0, 1))}
    assert len(gone) >= 2, "what the one that answers holds can go"
