"""A real node and a real client, both through the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from support.node_facts import of, samples_in

from moehive.node.demo.processes import NodeGroup

pytestmark = pytest.mark.swarm


def test_a_client_generates_with_a_node_that_then_leaves_cleanly(converted, tmp_path, moehive, monkeypatch):
    model_id = json.loads(moehive("inspect", converted, "--no-verify", "--json").out)["modelId"]
    arguments = [sys.executable, "-P", "-m", "moehive.node.cli", "generate", "ROMEO:", "--model", model_id, "--json"]
    with NodeGroup(tmp_path, converted) as group, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"\0moehive-test-{os.getpid()}"  # a path may be too long
        systemd.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        node = group.start("all", None)
        ticket = str(node.wait_until_ready().ticket)
        environment = os.environ | {"MOEHIVE_GENERATE_JOIN": ticket, "MOEHIVE_GENERATE_MAX_TOKENS": "4"}
        client = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240, check=False)
        monkeypatch.setenv("MOEHIVE_HOME", str(node._home))  # from now on we look at it as its user does
        seen = wait_for_requests(moehive)
        shown = moehive("top", "--once")
        check_http(seen)
        assert node._process is not None
        node._process.send_signal(signal.SIGINT)
        assert node._process.wait(60) == 0
        check_systemd(systemd)

    assert client.returncode == 0, client.stderr
    said = json.loads(client.stdout)
    assert len(said["tokens"]) == 4
    assert said["swarm"]["peers"][0]["rows"] > 0
    assert (said["swarm"]["localRows"], said["swarm"]["retries"]) == (0, 0)
    check_status(seen, said)
    assert shown.code == 0
    assert all(part in shown.out for part in (seen["peer"], "demo: holds 48 of 48 experts", "answered", "loads"))
    gone = moehive("top", "--once")
    assert gone.code == 1
    assert "no node runs here" in gone.err
    assert list((tmp_path / "node-1").rglob("nodes/*")) == []


def wait_for_requests(moehive):
    """What `moehive top` says once it has heard of all that was asked: it is up to a second behind."""
    pause, said = threading.Event(), {}
    for _ in range(600):
        outcome = moehive("top", "--json")
        assert outcome.code == 0
        (now,) = json.loads(outcome.out)["nodes"]
        if now["requests"]["done"] and now["requests"] == said.get("requests"):
            return now
        said = now
        pause.wait(0.1)
    pytest.fail("the node says nothing of the requests that it answered")


def check_http(seen):
    """What it says over HTTP against what its status file says; nothing has been asked of it in between."""
    with httpx.Client(base_url=seen["http"], timeout=60) as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        assert client.get("/health/ready", headers={"host": "evil.example"}).status_code == 400
        status, metrics = client.get("/api/v1/status").json(), samples_in(client.get("/metrics").text)
        coverage, peers = client.get("/api/v1/coverage").json(), client.get("/api/v1/peers").json()
        assert "<canvas" in client.get("/").text
    same = set(status) - {"updated", "peers"}  # who asked a moment ago changes by itself
    assert {name: status[name] for name in same} == {name: seen[name] for name in same}
    assert of(metrics, "moehive_ready") == 1
    assert of(metrics, "moehive_requests_total") == of(metrics, "moehive_request_seconds_count")
    assert of(metrics, "moehive_request_rows_total") == seen["requests"]["rows"]
    assert of(metrics, "moehive_upload_bytes_total") == seen["transfers"]["sentBytes"]
    assert of(metrics, "moehive_tier_budget_bytes", tier="ram") == 256 << 20
    for layer in seen["experts"]["layers"]:
        where = {"tier": "ram", "layer": layer["layer"]}
        assert of(metrics, "moehive_tier_hits_total", **where) == layer["hits"]
        assert of(metrics, "moehive_tier_misses_total", **where) == layer["misses"]
        assert of(metrics, "moehive_tier_load_seconds_count", source="disk", **where) == layer["latency"]["count"]
    assert [layer["holders"] for layer in coverage["layers"]] == [[1] * 8] * 6
    assert [(peer["peer"], peer["self"], peer["experts"]) for peer in peers["peers"]] == [(seen["peer"], True, 48)]


def check_systemd(listener):
    """What it said of itself from its start to its end."""
    said = [listener.recv(4096).decode().splitlines()[0] for _ in range(4)]
    assert said == ["STATUS=joins the swarm", "STATUS=loads experts", "READY=1", "STOPPING=1"]


def check_status(seen, said):
    """The node's own words against the client's."""
    (peer,) = said["swarm"]["peers"]
    ram, disk = seen["experts"]["tiers"]
    assert seen["requests"]["rows"] == peer["rows"]
    assert seen["requests"]["done"] == seen["requests"]["latency"]["count"] == peer["requests"]
    assert 0 < seen["requests"]["latency"]["p50"] <= seen["requests"]["latency"]["p99"]
    assert disk["hits"] == ram["misses"] == disk["latency"]["count"] > 0
    assert 0 < ram["residentBytes"] <= ram["budgetBytes"] == 256 << 20
    assert disk["movedBytes"] == ram["residentBytes"], "nothing had to leave"
    assert 0 < seen["experts"]["layerCallsWithoutMiss"] < seen["experts"]["layerCalls"]
    assert seen["transfers"]["sentBytes"] > 0, "the client fetched the dense part"
