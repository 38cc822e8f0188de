"""The demonstration as a user runs it: real processes on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.swarm


@contextmanager
def demo(temporary: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running `moehive demo` in a session of its own, ended by force after four minutes."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "moehive.node.cli", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
        start_new_session=True,
    )
    watchdog = threading.Timer(240, process.kill)
    watchdog.start()
    try:
        with process:
            yield process
    finally:
        watchdog.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"{text!r} never came:\n{read}")


def nobody_is_left(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


def left_behind(temporary: Path) -> list[Path]:
    return list(temporary.glob("moehive-*"))  # torch makes a directory of its own there


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


def test_the_demo_generates_what_transformers_does_and_leaves_nothing(temporary):
    with demo(temporary, "--max-tokens", "16") as process:
        output = read_until(process, "[4/4]")
        processes = psutil.Process(process.pid).children(recursive=True)
        assert process.stdout is not None
        output += process.stdout.read()

    assert process.returncode == 0, output
    assert "same tokens as plain transformers: yes" in output
    rows = re.findall(r"^  node-\d +…\w+ +(\d+) +([\d,]+) +(\d+) %", output, re.MULTILINE)
    assert len(rows) == 3
    assert all(int(computed.replace(",", "")) > 0 for _, computed, _ in rows)
    assert all(int(held) < 48 for held, _, _ in rows)
    assert re.search(r"^  this client +0 +0 +0 %", output, re.MULTILINE)
    assert len(processes) >= 7  # three nodes, and a daemon of each and of the client
    assert nobody_is_left(processes)
    assert left_behind(temporary) == []


def test_ctrl_c_stops_everything(temporary):
    with demo(temporary, "--nodes", "2") as process:
        read_until(process, "node-1")
        processes = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.communicate()

    assert process.returncode == 130
    assert processes
    assert nobody_is_left(processes)
    assert left_behind(temporary) == []
