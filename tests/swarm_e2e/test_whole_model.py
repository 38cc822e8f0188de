"""Publishing and fetching whole models with real processes: killed, interrupted, resumed, in part, from a seed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import httpx
import pytest
import torch
from support.checkpoints import Checkpoints
from support.generation import generate, reference_tokens
from support.hub_server import HubServer
from support.processes import NodeProcess, Nodes, eventually

from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import MANIFEST_NAME
from moehive.swarm.assembly import WORK
from moehive.swarm.client import join
from moehive.swarm.convert import inspect
from moehive.swarm.paths import Paths
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory

pytestmark = pytest.mark.swarm

FAMILY = "mixtral"
SLOWLY = "80kB/s"  # some seconds for all of it: there is a middle to be killed in, on a busy machine too


@pytest.fixture
def converted(checkpoints: Checkpoints) -> Path:
    return checkpoints.converted(FAMILY)


def fetch(nodes: Nodes, source: NodeProcess, *options: Path | str, home: Path | None = None) -> NodeProcess:
    return nodes.run("fetch", source.ready()["modelId"], "--join", source.ticket, "--json", *options, home=home)


def objects(root: Path) -> dict[str, int]:
    """Finished objects in a store, and their inodes."""
    return {path.name: path.stat().st_ino for path in root.glob("objects/*/*")}


def wait_for_objects(root: Path, count: int) -> dict[str, int]:
    assert eventually(lambda: len(objects(root)) >= count, timeout=60), sorted(objects(root))
    return objects(root)


def test_publish_until_others_hold_a_copy_and_serve_what_was_fetched(
    nodes: Nodes, converted: Path, checkpoints: Checkpoints, tmp_path: Path, cache: Path
) -> None:
    publisher = nodes.run("publish", converted, "--copies", "1", "--json")
    fetched = fetch(nodes, publisher, "--to", tmp_path / "model")
    assert fetched.ready()["bytesFetched"] == fetched.ready()["bytes"] == publisher.ready()["bytesSupplied"]
    fetched.expect_clean_end()
    assert inspect(tmp_path / "model").ok
    told = httpx.get(f"{publisher.ready()['http']}/api/v1/status", timeout=60).json()
    assert told["transfers"]["sentBytes"] >= fetched.ready()["bytes"]  # and the manifest
    node = nodes.start(tmp_path / "model", "--experts", "all", "--join", publisher.ticket)
    node.ready()
    publisher.expect_clean_end(timeout=60)
    assert "copies that others hold: 1.00" in publisher.log
    with join(node.ticket, cache=cache) as swarm:
        model, _ = swarm.load(node.ready()["modelId"], dtype=torch.float32)
        assert generate(model) == reference_tokens(checkpoints.reference(FAMILY))


def test_a_killed_fetch_goes_on_and_fetches_nothing_twice(nodes: Nodes, converted: Path, tmp_path: Path) -> None:
    publisher = nodes.run("publish", converted, "--upload-rate", SLOWLY, "--json")
    target = tmp_path / "model"
    first = fetch(nodes, publisher, "--to", target)
    kept = wait_for_objects(target / WORK / "store", 5)
    first.kill()
    assert not (target / MANIFEST_NAME).exists()
    publisher.stop()
    publisher = nodes.run("publish", converted, "--json", home=publisher.home)  # as fast as it goes
    second = fetch(nodes, publisher, "--to", target, home=first.home)
    assert second.ready()["modelId"] == publisher.ready()["modelId"]
    second.expect_clean_end()
    assert inspect(target).ok
    inodes = {path.stat().st_ino for path in target.rglob("*")}
    assert set(kept.values()) <= inodes, "an object that was there was fetched again"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_fetch_says_so_and_goes_on_in_the_store(
    nodes: Nodes, converted: Path, number: signal.Signals, code: int
) -> None:
    publisher = nodes.run("publish", converted, "--upload-rate", SLOWLY, "--json")
    first = fetch(nodes, publisher)
    root = Paths.of({"MOEHIVE_HOME": str(first.home)}).store
    kept = wait_for_objects(root, 4)
    os.kill(first.pid, number)
    first.expect_clean_end(code=code)
    assert "interrupted; the same command goes on where it stopped" in first.log
    store = ContentStore(root, 1 << 30)
    for key in store.objects():
        store.verify(key)
    publisher.stop()
    publisher = nodes.run("publish", converted, "--json", home=publisher.home)
    second = fetch(nodes, publisher, home=first.home)
    second.ready()
    second.expect_clean_end()
    assert kept.items() <= objects(root).items()
    assert len(objects(root)) == 1 + len(ConvertedDirectory(converted).manifest.shards)


def test_some_experts_only_and_then_the_others(nodes: Nodes, converted: Path, tmp_path: Path) -> None:
    manifest, target = ConvertedDirectory(converted).manifest, tmp_path / "model"
    publisher = nodes.run("publish", converted, "--json")
    some = fetch(nodes, publisher, "--to", target, "--experts", "0:0-3")
    assert some.ready()["experts"] == 4
    held = ConvertedDirectory(target)
    present = {key for key, shard in manifest.experts.items() if held.path(shard.hash) is not None}
    assert present == {ExpertKey(0, expert) for expert in range(4)}
    more = fetch(nodes, publisher, "--to", target)
    assert more.ready()["bytesFetched"] == more.ready()["bytes"] - some.ready()["bytes"]
    assert inspect(target).ok


def test_a_damaged_directory_is_not_published(nodes: Nodes, converted: Path, tmp_path: Path) -> None:
    damaged = Path(copytree(converted, tmp_path / "damaged"))
    shard = ConvertedDirectory(damaged).manifest.experts[ExpertKey(1, 1)]
    (damaged / shard.file).write_bytes(bytes(shard.size))
    publisher = nodes.run("publish", damaged, "--json")
    assert publisher.wait(60) == 1
    assert "is damaged or not complete" in publisher.log
    assert shard.file in publisher.log


def test_the_hub_stands_in_for_experts_that_no_peer_holds(
    nodes: Nodes, converted: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A fresh process, because huggingface_hub reads its settings when it is imported."""
    some = checkpoints.some(FAMILY, tmp_path / "some", lambda key: key.expert < 2)
    peer = nodes.start(some, "--experts", "*:0-1")
    with HubServer({"org/mixtral": checkpoints.source(FAMILY)}) as hub:
        environment = {
            **os.environ,
            "MOEHIVE_HOME": str(tmp_path / "home"),
            "HF_HOME": str(tmp_path / "huggingface"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-P", "-m", "moehive.node.cli", "fetch", peer.ready()["modelId"], "--json"]
        options = ["--join", peer.ticket, "--seed", "hub:org/mixtral", "--to", str(tmp_path / "model")]
        done = subprocess.run([*command, *options], env=environment, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["experts"] == len(ConvertedDirectory(converted).manifest.experts)
    assert inspect(tmp_path / "model").ok
    assert hub.ranges
