"""Signals as exceptions, once."""

from __future__ import annotations

import signal

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
