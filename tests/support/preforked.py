"""A process that has imported what a node needs and forks one whenever it is told to: half a second instead of five.

Run as a script by `support.processes`. Orders come as lines of JSON on stdin, each is answered by a line on stdout:

    {"arguments": [...], "environment": {...}, "stdout": FILE, "stderr": FILE, "fault": see faulty_node, or null}
                                                                                ->  {"pid": PID}
    {"wait": PID}                                                               ->  {"code": exit code, or null}

The first line, before any order, says {"ready": true}.

A forked node leads a session of its own and runs the same code as `moehive`, with its own environment. When stdin ends,
however its writer ended, every node is killed together with its children.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import threading
from contextlib import redirect_stdout
from typing import Any, NoReturn

from support import faulty_node
from support.sessions import kill_session


def import_all() -> None:
    """Everything that a node imports."""
    import moehive.node.cli.app
    import moehive.node.daemon
    import moehive.node.serving
    from moehive.swarm.transport.engine import import_hivemind

    import_hivemind()
    with redirect_stdout(io.StringIO()):
        moehive.node.cli.app.run(["id", "--help"])  # what is imported only when a command line is parsed
    assert threading.active_count() == 1, "a process with threads cannot be forked safely"


def serve() -> None:
    """Obey until stdin ends."""
    living: set[int] = set()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "wait" in order:
                code = _exit_code(order["wait"])
                if code is not None:
                    living.discard(order["wait"])
                _say({"code": code})
            else:
                pid = os.fork() or _run_node(order)
                living.add(pid)
                _say({"pid": pid})
    finally:
        for pid in living:
            kill_session(pid)


def _exit_code(pid: int) -> int | None:
    """None while it runs; negative for a signal, as in `subprocess`."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _run_node(order: dict[str, Any]) -> NoReturn:
    code = 70  # a bug: the traceback is in the log
    try:
        os.setsid()
        _redirect(0, os.devnull, os.O_RDONLY)
        _redirect(2, order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _redirect(1, order["stdout"], os.O_WRONLY)
        os.environ.clear()
        os.environ.update(order["environment"])
        tempfile.tempdir = None  # to be looked up again, in the new environment
        if order.get("fault"):
            faulty_node.install(order["fault"])
        from moehive.node.cli.app import run

        code = run(order["arguments"])
        sys.stdout.flush()
    finally:
        if code == 70:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is to be run here


def _redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    import_all()
    _say({"ready": True})
    serve()
    os._exit(0)  # at once: there is nothing to tidy up
