"""`moehive top`: what it makes of the states that nodes write; with a real node in test_node_swarm.py."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from support.node_facts import PEER, node_facts

from moehive.node.status import NodeStatus, Phase, StatusFile


@pytest.fixture
def running(home):
    """The file of a node that runs: of this process."""
    file = StatusFile(home / "cache" / "nodes", NodeStatus(PEER, node_facts, http="http://127.0.0.1:12345"))
    file._write(file._status.snapshot())
    return json.loads(file.path.read_text())


def test_nobody_runs(moehive):
    for arguments in ((), ("--once",)):
        outcome = moehive("top", *arguments)
        assert (outcome.code, outcome.out) == (1, "")
        assert "no node runs here" in outcome.err
    assert json.loads(moehive("top", "--json").out) == {"nodes": []}


def test_one_node_once(moehive, running):
    outcome = moehive("top", "--once")
    assert outcome.code == 0
    for part in (
        PEER,
        f"{PEER}, ready, process",
        "http://127.0.0.1:12345",
        "demo: holds 3 of 48",
        "33.3% of 3 uses",
        "2 loads, 20 B",
        "40 answered",
        "2 wait",
        "p50 100 ms",
    ):
        assert part in outcome.out
    assert "calls without a miss" in outcome.out
    assert json.loads(moehive("top", "--json").out) == {"nodes": [running]}


def test_rates_are_those_between_two_states(running):
    from moehive.node.cli.top import describe

    later = copy.deepcopy(running)
    later["updated"] += 2.0
    later["requests"]["done"] += 10
    later["transfers"]["receivedBytes"] += 4096
    text = describe([later], {PEER: running}, later["updated"])
    assert "50 answered, 5.0/s" in text
    assert "6.0 KiB, 2.0 KiB/s" in text
    assert "silent" not in text


def test_of_many_layers_those_are_shown_that_missed_most(running):
    from moehive.node.cli.top import describe

    [layer, *_] = running["experts"]["layers"]
    running["experts"]["layers"] = [layer | {"layer": 100 + number, "misses": number} for number in range(20)]
    shown = [line.split()[0] for line in describe([running], {}, running["updated"]).splitlines()[-12:]]
    assert shown == [str(100 + number) for number in range(8, 20)]


def test_a_node_that_does_not_write_any_more_is_marked(running):
    from moehive.node.cli.top import describe

    assert "silent" in describe([running], {}, running["updated"] + 60.0)


def test_a_device_and_what_memory_holds_as_stored_have_lines_of_their_own(moehive, home):
    from moehive.node.cli.top import describe

    stats = node_facts()
    facts = replace(stats, device="cuda:1", device_tier=stats.tier, stored=stats.tier)
    file = StatusFile(home / "cache" / "nodes", NodeStatus(PEER, lambda: facts, phase=lambda: Phase.LOADING))
    file._write(file._status.snapshot())
    said = moehive("top", "--once").out
    assert "cuda:1" in said
    assert "loading" in said
    assert "dashboard" not in said
    assert "33.3% of 3 uses; 20 B of 100 B; 20 B uploaded" in said
    assert "as stored" in said
    assert "33.3% of 3 that memory missed; 20 B of 100 B" in said
    tiers = json.loads(moehive("top", "--json").out)["nodes"][0]["experts"]["tiers"]
    later = json.loads(file.path.read_text())
    before = copy.deepcopy(later)
    later["updated"] += 2.0
    later["experts"]["tiers"][0]["movedBytes"] += 4096
    assert "4.0 KiB uploaded, 2.0 KiB/s" in describe([later], {PEER: before}, later["updated"])
    assert [tier["tier"] for tier in tiers] == ["vram", "ram", "ram-stored", "disk"]
