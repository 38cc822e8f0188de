"""Errors to messages and exit codes."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys

import pytest

from moehive.node import cli
from moehive.node.cli.errors import INTERRUPTED, exit_code, hint_of
from moehive.protocol import errors
from moehive.protocol.errors import ConfigError, ExpertUnavailable, LocalError, MoehiveError, PeerUnreachable


def ending(error: BaseException) -> tuple[int, str]:
    def fail() -> int:
        raise error

    stderr = io.StringIO()
    return exit_code(fail, stderr=stderr), stderr.getvalue()


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (7, 7)])
def test_what_a_command_returns_is_the_exit_code(result, code):
    assert exit_code(lambda: result) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (errors.TicketError("x"), 2),
        (errors.DestinationError("x"), 2),
        (LocalError("x"), 1),
        (PeerUnreachable("x"), 1),
        (ExpertUnavailable(3, [1]), 1),
    ],
)
def test_our_errors(error, code, monkeypatch):
    monkeypatch.delenv("MOEHIVE_DEBUG", raising=False)

    assert ending(error)[0] == code
    assert ending(error)[1].startswith(f"moehive: {error}")
    assert "Traceback" not in ending(error)[1]


def test_a_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("MOEHIVE_DEBUG", "1")

    code, message = ending(ConfigError("x"))

    assert code == 2
    assert "Traceback" in message
    assert message.endswith("moehive: x\n")


def test_an_interrupt_says_nothing():
    assert ending(KeyboardInterrupt()) == (130, "")


def test_our_own_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        ending(ZeroDivisionError())


def test_experts_without_a_holder_come_with_the_command_that_helps():
    assert hint_of(ExpertUnavailable(3, [1, 5])).endswith("--experts 3:1,3:5")


def test_every_error_that_is_not_the_callers_says_what_to_do_next():
    silent = {
        "MoehiveError",
        "LocalError",
        "StorageError",
        "DiskFull",
        "SwarmError",
    }  # raised with messages that say it
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MoehiveError)]

    for kind in kinds:
        if kind.__name__ not in silent and not issubclass(kind, (errors.CallerError, ExpertUnavailable)):
            assert hint_of(kind.__new__(kind)), kind


@pytest.mark.parametrize(("how", "said"), [(">/dev/full", "cannot write to the standard output: No space left"),
                                           (">&-", "the standard output is closed")])  # fmt: skip
@pytest.mark.parametrize("what", ["paths", "--help"])
def test_a_standard_output_that_takes_nothing_is_no_bug_of_ours(what, how, said, home):
    command = f'"{sys.executable}" -m moehive.node.cli {what} {how}'

    ended = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.startswith(f"moehive: {said}")
    assert ended.stderr.count("\n") == 1


def test_an_interrupt_while_the_commands_are_imported_says_nothing(monkeypatch):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "moehive.node.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "moehive.node.cli.app", raising=False)
    monkeypatch.delattr(cli, "app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == INTERRUPTED
