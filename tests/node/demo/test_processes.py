"""Node processes that misbehave."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from moehive.node.demo import processes
from moehive.node.demo.processes import NodeProcess, environment_of
from moehive.protocol.errors import LocalError


def test_a_node_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path):
    with (
        NodeProcess("node-7", tmp_path / "node", ["no-such-directory"]) as node,
        pytest.raises(LocalError, match=r"(?s)node-7 did not start.*neither a converted directory"),
    ):
        node.wait_until_ready()


def test_a_node_that_does_not_leave_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LEAVE_TIMEOUT", 0.05)
    monkeypatch.setattr(processes, "AT_ONCE_TIMEOUT", 0.05)
    node = NodeProcess("stubborn", tmp_path / "node", [])
    node._command = ["bash", "-c", "trap '' TERM; bash -c \"trap '' TERM; while :; do sleep 1; done\" & echo $!; wait"]
    with node:
        child = int(node._first_line.result(60))
        assert node._process is not None

    assert node._process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_settings_for_other_nodes_do_not_reach_these(tmp_path):
    environment = environment_of({"MOEHIVE_NODE_JOIN": "x", "PATH": "p", "MOEHIVE_HOME": "mine"}, tmp_path)

    assert environment == {"PATH": "p", "MOEHIVE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
