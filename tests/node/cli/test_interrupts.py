"""Ctrl-C while libraries are imported, which may swallow it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from moehive.node.cli.interrupts import ImportInterrupts, run_async
from moehive.protocol.errors import ConfigError

PROGRAM = """
import sys, threading
from moehive.node.cli import app

def command():
    try:
        import interrupted_at_import
    except BaseException:  # as libraries do
        pass
    raise ModuleNotFoundError("half imported")

if sys.argv[1] == "beside other work":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
app._COMMANDS["id"] = command
sys.exit(app.run(["id"]))
"""


@pytest.mark.parametrize("how", ["alone", "beside other work"])
def test_an_interrupt_that_an_import_swallows_ends_the_command_and_says_nothing(how: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted_at_import.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "MOEHIVE_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_error_after_an_interrupt_that_a_command_has_handled_stays_what_it_is() -> None:
    def work() -> None:
        with ImportInterrupts():
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise ConfigError("something else")

    with pytest.raises(ConfigError):
        work()


def test_who_handles_interrupts_already_is_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with ImportInterrupts():
            signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_coroutine_is_cancelled_and_may_clean_up() -> None:
    """Not so where a KeyboardInterrupt comes out of the middle of the event loop."""
    cleaned = []

    async def work() -> None:
        try:
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cleaned.append(True)
            raise

    with pytest.raises(KeyboardInterrupt), ImportInterrupts():
        run_async(work())
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
