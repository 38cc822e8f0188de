"""The status file: whole, private, of live processes only, and gone afterwards."""

from __future__ import annotations

import asyncio
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.node_facts import PEER, node_facts
from support.waiting import until

from moehive.node.status import NodeFacts, NodeStatus, StatusFile, read_statuses
from moehive.swarm.store.ledger import Usage


async def test_it_is_written_for_its_owner_alone_and_taken_away(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "nodes", NodeStatus(PEER, node_facts, http="http://127.0.0.1:1", clock=lambda: 12.0))
    running = asyncio.create_task(file.run())
    await until(file.path.exists)
    (status,) = read_statuses(tmp_path / "nodes")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert list((tmp_path / "nodes").iterdir()) == []
    assert (status["peer"], status["updated"], status["expertsHeld"]) == (PEER, 12.0, 3)
    assert (status["phase"], status["http"], status["requests"]["latency"]["p50"]) == (
        "ready",
        "http://127.0.0.1:1",
        0.1,
    )
    assert (status["requests"]["waiting"], status["requests"]["expectedWait"]) == (2, 2.5)
    assert (status["transfers"]["receivedBytes"], status["transfers"]["downloading"]) == (2048, {PEER: 5})


async def test_a_disk_that_refuses_does_not_end_the_node(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a file in its place")
    called: list[None] = []

    def counting() -> NodeFacts:
        called.append(None)
        return node_facts()

    running = asyncio.create_task(StatusFile(tmp_path / "nodes", NodeStatus(PEER, counting)).run())
    await until(lambda: called)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def write(directory: Path, name: str, status: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(status if isinstance(status, str) else json.dumps(status))


def test_what_dead_processes_left_and_what_is_no_status_is_passed_over(tmp_path: Path) -> None:
    own = StatusFile(tmp_path, NodeStatus(PEER, node_facts))
    own._write(own._status.snapshot())
    good = json.loads(own.path.read_text())
    write(tmp_path, "reused.json", good | {"processStarted": good["processStarted"] - 100.0})
    write(tmp_path, "dead.json", good | {"pid": 1 << 22})
    write(tmp_path, "newer.json", good | {"version": 3})
    write(tmp_path, "odd.json", good | {"pid": "one"})
    write(tmp_path, "half.json", json.dumps(good)[:-5])
    write(tmp_path, "list.json", "[]")
    write(tmp_path, "other.txt", good)
    assert list(read_statuses(tmp_path)) == [good]
    assert list(read_statuses(tmp_path / "nothing")) == []


def test_a_store_tells_how_full_it_is() -> None:
    said = replace(node_facts(), disk=Usage(objects=2, object_bytes=70, partial_bytes=5, budget_bytes=100)).to_json()
    assert said["disk"] == {"budgetBytes": 100, "usedBytes": 75, "objects": 2}
    assert "disk" not in replace(node_facts(), disk=None).to_json()
