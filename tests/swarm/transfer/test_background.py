"""Threads that give way."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from moehive.swarm.transfer import background
from moehive.swarm.transfer.background import start_thread


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives threads priorities of their own")
@pytest.mark.parametrize("niceness", [15, -20])
def test_a_thread_is_nice_and_its_process_is_not(niceness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "NICENESS", niceness)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found: list[int] = []
    thread = start_thread(
        lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())), "a bulk thread"
    )
    thread.join(60)
    assert found == [max(niceness, before)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert thread.name == "a bulk thread"
    assert thread.daemon
