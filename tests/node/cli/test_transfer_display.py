"""A transfer on stderr: words for how fast and how long, and a line now and then where there is no terminal."""

from __future__ import annotations

import pytest
from support.swarm_fakes import Clock

from moehive.node.cli.transfer_display import LINE_EVERY, TransferDisplay, describe, duration
from moehive.protocol.ids import PeerId
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.progress import TransferProgress

MIB = 1 << 20


def progress(verified: int, *peers: str, rate: float = 0.0) -> TransferProgress:
    return TransferProgress(verified, 100 * MIB, 1, 3, rate, {PeerId(peer): 1.0 for peer in peers})


def test_words() -> None:
    assert describe(progress(50 * MIB, "a", "b", rate=10 * MIB)) == "10.0 MiB/s from 2 peers, 5 s left"
    assert describe(progress(0, "a", "seed hub:x", rate=MIB)) == "1.0 MiB/s from 1 peer and 1 seed, 2 min left"
    assert describe(progress(0)) == "0 B/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h")])
def test_times(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_now_and_then(converted) -> None:
    clock, lines = Clock(), list[str]()
    with TransferDisplay(write=lines.append, terminal=False, clock=clock) as display:
        display.begin(ConvertedDirectory(converted).manifest, 200 * MIB)
        display.found(100 * MIB)
        assert lines == []
        clock.now += LINE_EVERY
        display.transfer(progress(50 * MIB, "a", rate=10 * MIB))
        display.transfer(progress(60 * MIB, "a", rate=10 * MIB))
    assert lines == ["150.0 MiB of 200.0 MiB, 10.0 MiB/s from 1 peer, 5 s left (75 %)"]


def test_a_bar_on_a_terminal_leaves_nothing_behind(converted, capsys) -> None:
    with TransferDisplay(terminal=True) as display:
        display.begin(ConvertedDirectory(converted).manifest, 200 * MIB)
        display.found(MIB)
        display.transfer(progress(50 * MIB, "a", rate=10 * MIB))
    assert capsys.readouterr().out == ""
