"""A real node and a real client, both through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from moehive.node.demo.processes import NodeGroup

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]


def test_a_client_generates_with_a_node_that_then_leaves_cleanly(converted, tmp_path, moehive):
    model_id = json.loads(moehive("inspect", converted, "--no-verify", "--json").out)["modelId"]
    arguments = [sys.executable, "-P", "-m", "moehive.node.cli", "generate", "ROMEO:", "--model", model_id, "--json"]
    with NodeGroup(tmp_path, converted) as group:
        node = group.start("all", None)
        ticket = str(node.wait_until_ready().ticket)
        environment = os.environ | {"MOEHIVE_GENERATE_JOIN": ticket, "MOEHIVE_GENERATE_MAX_TOKENS": "4"}
        client = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=90, check=False)
        assert node._process is not None
        node._process.send_signal(signal.SIGINT)
        assert node._process.wait(30) == 0

    assert client.returncode == 0, client.stderr
    said = json.loads(client.stdout)
    assert len(said["tokens"]) == 4
    assert said["swarm"]["peers"][0]["rows"] > 0
    assert (said["swarm"]["localRows"], said["swarm"]["retries"]) == (0, 0)
