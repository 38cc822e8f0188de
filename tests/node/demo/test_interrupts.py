"""Signals as exceptions, once."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from moehive.node.demo.interrupts import SIGNALS, Interrupts


def test_an_interrupt_raises_once_and_then_lets_us_clean_up():
    before = [signal.getsignal(number) for number in SIGNALS]

    cleaned_up = []

    def work() -> None:
        with Interrupts():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                cleaned_up.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()

    assert cleaned_up
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_error_that_a_swallowed_interrupt_led_to_is_that_interrupt():
    """So fail imports of transformers, whose parts swallow what is raised in them."""

    def work(number: int | None) -> None:
        with Interrupts():
            if number is not None:
                with suppress(BaseException):
                    signal.raise_signal(number)
            raise ModuleNotFoundError("half imported")

    with pytest.raises(KeyboardInterrupt):
        work(signal.SIGINT)
    with pytest.raises(SystemExit):
        work(signal.SIGTERM)
    with pytest.raises(ModuleNotFoundError):
        work(None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_names_the_signal(number):
    with pytest.raises(SystemExit) as raised, Interrupts():
        signal.raise_signal(number)

    assert raised.value.code == 128 + number


def test_while_held_the_end_is_put_off():
    done = []

    def work() -> None:
        with Interrupts() as interrupts:
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                done.append("started")
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()

    assert done == ["started"]
