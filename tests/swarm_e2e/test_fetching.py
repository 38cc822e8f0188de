"""A node that starts with nothing but a model id: what it fetched is verified, and outlives the one it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.generation import generate, reference_tokens
from support.processes import Nodes

from moehive.swarm.client import join
from moehive.swarm.paths import Paths
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "mixtral"


def test_fetched_shards_are_verified_and_serve_on_when_the_seed_is_killed(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path
) -> None:
    directory = checkpoints.converted(FAMILY)
    manifest = ConvertedDirectory(directory).manifest
    seed = nodes.start(directory, "--experts", "all")
    fetched = nodes.start(manifest.model_id, "--experts", "all", "--join", seed.ticket)
    assert fetched.ready()["expertsHeld"] == len(manifest.experts)
    assert fetched.ready()["skeleton"] is True

    store = ContentStore(Paths.of({"MOEHIVE_HOME": str(fetched.home)}).store, 1 << 30)
    assert set(store.objects()) == {manifest.model_id, *(shard.hash for shard in manifest.shards)}
    for object_hash in store.objects():
        store.verify(object_hash)

    seed.kill()
    with join(fetched.ticket, cache=cache) as swarm:
        model, tokenizer = swarm.load(manifest.model_id, dtype=torch.float32)
        assert generate(model) == reference_tokens(checkpoints.reference(FAMILY))
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer("Et tu?").input_ids, skip_special_tokens=True) == "Et tu?"


def test_a_node_that_was_killed_while_it_fetched_goes_on_where_it_was(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path
) -> None:
    directory = checkpoints.converted(FAMILY)
    manifest = ConvertedDirectory(directory).manifest
    seed = nodes.start(directory, "--experts", "all")
    some = nodes.start(manifest.model_id, "--experts", "0:0-3", "--no-skeleton", "--join", seed.ticket)
    some.ready()
    some.kill()
    more = nodes.start(manifest.model_id, "--experts", "all", "--no-skeleton", "--join", seed.ticket, home=some.home)
    assert more.ready()["expertsHeld"] == len(manifest.experts)
    assert more.log.count("shard fetched") == len(manifest.experts) - 4
