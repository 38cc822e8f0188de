"""Nodes as processes of their own, for tests and benchmarks. Nothing outlives the `Nodes` context.

    with Nodes(directory) as nodes:
        first = nodes.start(converted, "--experts", "all")
        others = [nodes.start(converted, "--experts", "0-3:*", "--join", first.ticket) for _ in range(2)]
        others[0].ready()                       # they start beside each other
        others[0].kill()                        # SIGKILL; also: stop(), freeze(), thaw()

Each node runs the code of `moehive node --json` in a session of its own, forked from a process that has done the
imports. It has its own MOEHIVE_HOME and TMPDIR, so what it leaves behind can be seen, and one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.sessions import kill_session, members

# Seconds that only what fails takes, and a machine that is slow and busy.
START_TIMEOUT = 100.0  # imports included
READY_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
_LOG_TAIL = 30  # lines
_TESTS = Path(__file__).parents[1]


class NodeFailed(AssertionError):
    """A node did not do what was expected of it in time; the message ends with its log."""


class NodeProcess:
    """One started node. Made by `Nodes.start`."""

    def __init__(
        self,
        nodes: Nodes,
        name: str,
        home: Path,
        command: str,
        arguments: Iterable[str],
        fault: str | None = None,
    ) -> None:
        self.name = name
        self.home = home
        self._nodes = nodes
        self._said = b""
        self._code: int | None = None
        self._files = home / name  # of this process; the home may have been another one's
        self.temporary.mkdir(parents=True)
        os.mkfifo(self._files / "stdout")
        self._stdout = os.open(self._files / "stdout", os.O_RDONLY | os.O_NONBLOCK)
        self.pid = nodes.fork(
            arguments=[command, *arguments],
            environment={**os.environ, "MOEHIVE_HOME": str(home), "TMPDIR": str(self.temporary)},
            stdout=str(self._files / "stdout"),
            stderr=str(self._files / "log"),
            fault=fault,
        )

    # --- what it says -----------------------------------------------------------------------------------------------

    def ready(self, timeout: float = READY_TIMEOUT) -> Mapping[str, Any]:
        """What it printed when it was ready (see `moehive node --json`)."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while b"\n" not in self._said:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise self._failed(f"is not ready after {timeout:g} s")
            data = os.read(self._stdout, 1 << 16)
            if not data:
                raise self._failed(f"ended with {self.wait()} before it was ready")
            self._said += data
        answer: dict[str, Any] = json.loads(self._said)
        return answer

    @property
    def peer(self) -> str:
        """Its peer id."""
        return str(self.ready()["peer"])

    @property
    def ticket(self) -> str:
        """A join ticket that names it."""
        return str(self.ready()["ticket"])

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        path = self._files / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def temporary(self) -> Path:
        """Where its temporary files lie: empty again after it has left cleanly."""
        return self._files / "tmp"

    # --- what is done to it -----------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """SIGINT, as Ctrl-C: leave cleanly. Does not wait."""
        os.kill(self.pid, signal.SIGINT)

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Have it leave cleanly: exit code 0, no process and no file left."""
        self.interrupt()
        self.expect_clean_end(timeout)

    def expect_clean_end(self, timeout: float = STOP_TIMEOUT, *, code: int = 0) -> None:
        """It ends with this exit code and leaves no process and no temporary file behind."""
        wanted, code = code, self.wait(timeout)
        left = [*map(str, members(self.pid)), *map(str, self.temporary.iterdir())]
        if code != wanted or left:
            raise self._failed(f"left with exit code {code}, leaving behind {left or 'nothing'}")

    def kill(self) -> None:
        """SIGKILL to the node alone: its p2pd lives on for some seconds, as it would anywhere."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def freeze(self) -> None:
        """SIGSTOP: it accepts connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for its end; the exit code, negative for a signal."""

        def ended() -> bool:
            self._code = self._nodes.exit_code(self.pid)
            return self._code is not None

        if self._code is None and not eventually(ended, timeout):
            raise self._failed(f"runs after {timeout:g} s")
        assert self._code is not None
        return self._code

    def close(self) -> None:
        """End it and its children, whatever state it is in; not to be used afterwards."""
        self._nodes.forget(self)
        kill_session(self.pid)
        self.wait()
        os.close(self._stdout)

    def _failed(self, what: str) -> NodeFailed:
        tail = "\n    ".join(self.log.splitlines()[-_LOG_TAIL:])
        return NodeFailed(f"{self.name} (process {self.pid}) {what}; the end of its log:\n    {tail}")


class Nodes:
    """Starts nodes; a context manager. Leaving ends them all."""

    def __init__(self) -> None:
        # Not pytest's directory: the path of a unix socket has 107 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="moehive-nodes-"))
        self._numbers = itertools.count()
        self._living: list[NodeProcess] = []
        self._parent: subprocess.Popen[bytes] | None = None
        self._forks = False  # whether the parent has said that it is ready
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._parent = subprocess.Popen(
            [sys.executable, "-P", "-m", "support.preforked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": str(_TESTS), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for us
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._parent is not None
        try:
            self.end_all()
        finally:
            self._parent.communicate(timeout=STOP_TIMEOUT)  # it kills what is left
            shutil.rmtree(self.directory, ignore_errors=True)

    def start(
        self, model: Path | str, *options: str, home: Path | None = None, fault: str | None = None
    ) -> NodeProcess:
        """Start `moehive node MODEL OPTIONS`; returns at once. `home` of a node that has ended: be its successor.

        `fault` makes it misbehave (see `support.faulty_node`).
        """
        name = f"node{next(self._numbers)}"
        arguments = [str(model), "--json", "--threads", "1", "--ram", "256MiB", "--log-format", "json", *options]
        return self._begin(name, home, "node", arguments, fault)

    def run(self, command: str, *arguments: Path | str, home: Path | None = None) -> NodeProcess:
        """Start another command of `moehive` than `node`; `ready` is the line of JSON that it prints."""
        return self._begin(f"{command}{next(self._numbers)}", home, command, map(str, arguments))

    def swarm(self, model: Path | str, *experts: str) -> list[NodeProcess]:
        """A swarm of one node for each of `experts`, all ready; the first one founds it."""
        founder = self.start(model, "--experts", experts[0])
        others = [self.start(model, "--experts", spec, "--join", founder.ticket) for spec in experts[1:]]
        for node in others:
            node.ready()
        return [founder, *others]

    def end_all(self) -> None:
        """End all nodes at once, whatever state they are in."""
        ending, self._living = self._living, []
        for node in ending:
            kill_session(node.pid)
        for node in ending:
            node.close()

    def _begin(
        self, name: str, home: Path | None, command: str, arguments: Iterable[str], fault: str | None = None
    ) -> NodeProcess:
        process = NodeProcess(self, name, home or self.directory / name, command, arguments, fault)
        self._living.append(process)
        return process

    def forget(self, process: NodeProcess) -> None:
        """It is being closed: not by us."""
        if process in self._living:
            self._living.remove(process)

    # --- for NodeProcess --------------------------------------------------------------------------------------------

    def fork(self, **order: Any) -> int:
        """Process id of a new node."""
        return int(self._ask(order)["pid"])

    def exit_code(self, pid: int) -> int | None:
        """None while it runs. Not to be asked again once it is known."""
        code: int | None = self._ask({"wait": pid})["code"]
        return code

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._parent is not None
        assert self._parent.stdin is not None
        with self._lock:
            if not self._forks:
                self._forks = bool(self._answer()["ready"])
            self._parent.stdin.write(json.dumps(order).encode() + b"\n")
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._parent is not None
        assert self._parent.stdout is not None
        poll = select.poll()
        poll.register(self._parent.stdout, select.POLLIN)
        line = self._parent.stdout.readline() if poll.poll(START_TIMEOUT * 1000) else b""
        if not line:
            raise NodeFailed("the process that starts nodes does not answer; see what it wrote to stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


def eventually(condition: Callable[[], bool], timeout: float) -> bool:
    """Whether `condition` becomes true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True
