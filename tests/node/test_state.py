"""A node's phases, and what systemd is told of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from moehive.node.notify import tell_systemd
from moehive.node.state import NodeState
from moehive.node.status import Phase


def test_a_node_never_goes_back() -> None:
    heard: list[Phase] = []
    state = NodeState(heard.append)
    for phase in (Phase.LOADING, Phase.LEAVING, Phase.READY, Phase.LEAVING):
        state.enter(phase)
    assert heard == [Phase.STARTING, Phase.LOADING, Phase.LEAVING]
    assert state.phase is Phase.LEAVING


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_by_datagrams(tmp_path: Path, abstract: bool) -> None:
    name = f"@moehive-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0") if abstract else name)
        state = NodeState(lambda phase: tell_systemd(phase, {"NOTIFY_SOCKET": name}))
        for phase in Phase:
            state.enter(phase)
        said = [listener.recv(4096).decode().splitlines() for _ in Phase]
    assert [lines[0] for lines in said] == ["STATUS=joins the swarm", "STATUS=loads experts", "READY=1", "STOPPING=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_where_nobody_listens_nothing_is_said(environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    tell_systemd(Phase.READY, environment)
    assert caplog.records == []


def test_a_listener_that_is_gone_does_not_end_the_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell_systemd(Phase.READY, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert [record.message for record in caplog.records] == ["systemd cannot be told"]
