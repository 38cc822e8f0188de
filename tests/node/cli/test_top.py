"""`moehive top`: what it makes of the states that nodes write; with a real node in test_node_swarm.py."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from support.swarm_fakes import MODEL, identity

from moehive.node.scheduler import QueueFacts
from moehive.node.status import NodeFacts, StatusFile
from moehive.swarm.telemetry.histogram import Latencies
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.transfer.uploads import Uploads

PEER = identity(1).peer


def state() -> NodeFacts:
    tier = RamTier[int, str](
        100, lambda _: "weights", room=lambda _: 10, size=lambda _: 10, group=lambda key: key, loaders=0
    )
    for key in (0, 1, 1):
        tier.note(Uses(key, {key: 1}))
        with tier.lease(key):
            pass
    latencies = Latencies(40, 4.0, 0.1, 0.2, 0.3)
    return NodeFacts(
        MODEL, "demo", 3, 48, tier.stats, QueueFacts(2, 100, 5, 0.5), 40, 90, latencies, Uploads().facts, 2048, {}, 2
    )


@pytest.fixture
def running(home):
    """The file of a node that runs: of this process."""
    file = StatusFile(home / "cache" / "nodes", PEER, state)
    file._write(file._content())
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

    stats = state()
    facts = replace(stats, device="cuda:1", device_tier=stats.tier, stored=stats.tier)
    file = StatusFile(home / "cache" / "nodes", PEER, lambda: facts)
    file._write(file._content())
    said = moehive("top", "--once").out
    assert "cuda:1" in said
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
