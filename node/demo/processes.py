"""Real `moehive node` processes on this machine, each with a home of its own; none of them outlives the context.

Each runs in a session of its own, so that Ctrl-C reaches only us and we decide the order of leaving; a node that does
not leave is killed together with its children.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moehive.protocol.errors import LocalError
from moehive.protocol.ids import PeerId
from moehive.protocol.ticket import Ticket

READY_TIMEOUT = 60.0  # seconds; a slow disk under load imports torch in 20
LEAVE_TIMEOUT = 6.0  # seconds to leave cleanly
AT_ONCE_TIMEOUT = 3.0  # seconds to leave after the second signal
_LOG_TAIL = 8  # lines shown of a node that failed


@dataclass(frozen=True, slots=True)
class RunningNode:
    """What a node said when it was ready."""

    peer: PeerId
    held: int
    experts: int
    ticket: Ticket

    @classmethod
    def read(cls, line: str) -> RunningNode:
        """From the line of `moehive node --json`."""
        said: dict[str, Any] = json.loads(line)
        return cls(said["peer"], said["expertsHeld"], said["expertsTotal"], Ticket.parse(said["ticket"]))


class NodeProcess:
    """One started node; a context manager. Its log goes to `home`/node.log."""

    def __init__(self, name: str, home: Path, arguments: Sequence[str]) -> None:
        self.name = name
        self._home = home
        # -P: the working directory stays off sys.path, whatever lies there
        self._command = [sys.executable, "-P", "-m", "moehive.node.cli", "node", "--json", *arguments]
        self._process: subprocess.Popen[str] | None = None
        self._first_line: Future[str] = Future()

    def __enter__(self) -> Self:
        self._home.mkdir(parents=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment_of(os.environ, self._home),
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read_line, args=(self._process,), name=self.name, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask_to_leave()
        self.wait_until_gone()

    def wait_until_ready(self, timeout: float = READY_TIMEOUT) -> RunningNode:
        """What it says when it is ready. Raises LocalError with the end of its log when it does not get there."""
        try:
            line = self._first_line.result(timeout)
        except TimeoutError:
            line = ""
        if not line:
            lines = self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
            raise LocalError("\n    ".join((f"{self.name} did not start; the end of its log:", *lines)))
        return RunningNode.read(line)

    def ask_to_leave(self) -> None:
        """Send SIGTERM, without waiting."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()

    def wait_until_gone(self) -> None:
        """Wait for it to leave; then ask again, which means at once; then kill it and its children."""
        process = self._process
        assert process is not None
        try:
            for timeout in (LEAVE_TIMEOUT, AT_ONCE_TIMEOUT):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
                    break
                self.ask_to_leave()
        finally:  # also where Ctrl-C interrupts the wait
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # nobody is left in its session where it left cleanly
            process.wait()

    @property
    def _log(self) -> Path:
        return self._home / "node.log"

    def _read_line(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as stdout:
            self._first_line.set_result(stdout.readline())
            stdout.read()  # nothing is expected; a full pipe would stop it


def environment_of(ours: Mapping[str, str], home: Path) -> dict[str, str]:
    """A node's environment: ours without the settings meant for other nodes, with a home of its own."""
    kept = {name: value for name, value in ours.items() if not name.startswith("MOEHIVE_NODE_")}
    return kept | {"MOEHIVE_HOME": str(home), "OMP_NUM_THREADS": "1"}


class NodeGroup:
    """Nodes of one swarm that serve the converted directory `model`; a context manager, on leaving all of them leave.

    `shield` makes a context in which this thread is not interrupted: no process is started without being known here.
    """

    def __init__(
        self, directory: Path, model: Path, shield: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.nodes: list[NodeProcess] = []
        self._directory = directory
        self._model = model
        self._shield = shield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.push(node.__exit__)
                node.ask_to_leave()  # all at once: then they do not wait for each other

    def start(self, experts: str, ticket: Ticket | None) -> NodeProcess:
        """A node that holds `experts`, in the swarm of `ticket` or a new one."""
        name = f"node-{len(self.nodes) + 1}"
        joining = () if ticket is None else ("--join", str(ticket))
        options = ("--experts", experts, "--ram", "256MiB", "--threads", "1", "--log-format", "console")
        with self._shield():
            node = NodeProcess(name, self._directory / name, (str(self._model), *options, *joining)).__enter__()
            self.nodes.append(node)
        return node
