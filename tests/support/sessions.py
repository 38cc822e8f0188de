"""Sessions of processes: what a started node leaves behind is in its session, p2pd included, however deep."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def members(session: int) -> list[int]:
    """Ids of the live processes in a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):  # gone meanwhile
                state, _, _, sid = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
                if int(sid) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def kill_session(session: int) -> None:
    """SIGKILL every process in a session until there is none."""
    while pids := members(session):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
