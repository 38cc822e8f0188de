"""Runs the tests that are marked `interpreted` in a child process that has Triton's interpreter.

Triton decides at import whether `@triton.jit` compiles or interprets, so one process cannot have both, and a kernel
that reads outside its buffers kills the interpreter's process. Here the parent collects all tests as usual; the marked
ones run in one child pytest, whose reports the parent shows as its own: selection, order, `-x` and failure texts work
as they always do. When the child dies, the test that it was in has failed, and a new child takes the rest.
"""

from __future__ import annotations

import ast
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

MARK = "interpreted"
_PATIENCE = 400  # seconds that the parent waits for one test
_REPORTS_FD = "MOEHIVE_TEST_REPORTS_FD"  # in the child: where its reports go


def is_interpreter() -> bool:
    """Whether this process has Triton's interpreter: the child's, or one started by hand with TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class ReportWriter:
    """The child's plugin: what happens to each test, one Python literal a line (JSON would turn tuples into lists)."""

    def __init__(self, config: pytest.Config, pipe: IO[str]) -> None:
        self._config = config
        self._pipe = pipe

    @classmethod
    def from_environment(cls, config: pytest.Config) -> ReportWriter | None:
        """A writer to the pipe that the parent opened, or None when nobody listens."""
        descriptor = os.environ.pop(_REPORTS_FD, None)
        return None if descriptor is None else cls(config, os.fdopen(int(descriptor), "w", encoding="utf-8"))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send("start", nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send("report", report.nodeid, data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send("finish", nodeid, None)

    def _send(self, event: str, nodeid: str, data: object) -> None:
        print(repr((event, nodeid, data)), file=self._pipe, flush=True)


class InterpreterProcess:
    """One child and what it said so far."""

    def __init__(self, config: pytest.Config, nodeids: Sequence[str]) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  see close()
        self._finished: dict[str, list[Any]] = {}
        self._current: tuple[str, list[Any]] | None = None
        receiving, sending = os.pipe()
        with tempfile.NamedTemporaryFile("w", suffix=".nodeids", delete=False) as file:
            file.write("\n".join(nodeids))
        self._nodeids = Path(file.name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", f"@{file.name}"],
            cwd=config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", _REPORTS_FD: str(sending)},
            pass_fds=(sending,),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(sending)
        # Read at all times: a child that has to wait for the parent, which runs other tests in between, runs into the
        # timeout of whatever test it is in.
        self._pipe = os.fdopen(receiving, encoding="utf-8")
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while (line := self._pipe.readline()).endswith("\n"):
            self._lines.put(line)
        self._lines.put("")

    def reports(self, nodeid: str) -> list[Any] | None:
        """Wait for what became of one test. None: the child ended without finishing it."""
        while nodeid not in self._finished:
            line = self._lines.get()
            if not line:
                self._process.wait()
                return None
            self._take(*ast.literal_eval(line))
        return self._finished.pop(nodeid)

    def _take(self, event: str, nodeid: str, data: Any) -> None:
        if event == "start":
            self._current = (nodeid, [])
        elif event == "report":
            assert self._current is not None
            self._current[1].append(data)
        else:
            assert self._current is not None
            self._finished[nodeid] = self._current[1]
            self._current = None

    @property
    def victim(self) -> str | None:
        """Once the child has ended: the test that it was in."""
        return None if self._current is None else self._current[0]

    def epitaph(self) -> str:
        """How the child ended and the last that it said."""
        self._output.seek(0)
        return f"the interpreter's process ended with {self._process.returncode}:\n{self._output.read()[-8000:]}"

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._pipe.close()
        self._output.close()
        self._nodeids.unlink(missing_ok=True)


class InterpretedTests:
    """The parent's plugin: has the marked tests run by a child, and shows its reports."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._waiting: list[str] | None = None  # None: nothing asked for yet
        self._lost: dict[str, str] = {}  # tests that a child took with it, and how
        self._child: InterpreterProcess | None = None
        config.add_cleanup(self._close)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The child has the same timeout and says what hung; the parent waits longer, for its start as well."""
        for item in items:
            if item.get_closest_marker(MARK) is not None:
                item.add_marker(pytest.mark.timeout(_PATIENCE))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Take the marked tests away from pytest's own runner."""
        if item.get_closest_marker(MARK) is None:
            return None
        if self._waiting is None:
            self._waiting = [other.nodeid for other in item.session.items if other.get_closest_marker(MARK)]
        hook, nodeid, location = item.config.hook, item.nodeid, item.location
        hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        for report in self._outcome(item):
            hook.pytest_runtest_logreport(report=report)
        # What the test before this one left set up, counting on its successor. pytest has no public call for it alone.
        item.session._setupstate.teardown_exact(nextitem)
        hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        return True

    def _outcome(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        assert self._waiting is not None
        while item.nodeid not in self._lost:
            self._child = self._child or InterpreterProcess(self._config, self._waiting)
            try:
                reports = self._child.reports(item.nodeid)
            except pytest.fail.Exception as timeout:  # pytest-timeout's, should the child's own not have come
                self._child.close()
                self._lost[item.nodeid] = f"nothing from the interpreter's process: {timeout}"
                self._waiting.remove(item.nodeid)
                self._child = None
                break
            if reports is not None:
                self._waiting.remove(item.nodeid)
                for data in reports:
                    yield self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
                return
            self._bury()
        yield pytest.TestReport(
            item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", self._lost[item.nodeid], "call"
        )

    def _bury(self) -> None:
        """The child is dead. One that had not begun any test would not do better a second time: all are lost."""
        assert self._child is not None
        assert self._waiting is not None
        lost = [self._child.victim] if self._child.victim else list(self._waiting)
        self._lost |= dict.fromkeys(lost, self._child.epitaph())
        self._waiting = [nodeid for nodeid in self._waiting if nodeid not in self._lost]
        self._close()

    def _close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
