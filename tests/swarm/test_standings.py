"""Which errors count against whom."""

from __future__ import annotations

import pytest
from support.swarm_fakes import Clock

from moehive.protocol.errors import (
    FalseClaim,
    IntegrityError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolViolation,
    RefusalCode,
)
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.standing import FIRST_BAN, FIRST_PAUSE
from moehive.swarm.standings import Standings

A, B = PeerId("A"), PeerId("B")


@pytest.mark.parametrize("kind", [IntegrityError, FalseClaim, ProtocolViolation])
def test_a_proven_lie_bans(kind: type[PeerError]) -> None:
    clock = Clock()
    standings = Standings(clock)
    standings.blame(kind("bad", peer=A))
    assert standings.banned(A)
    assert standings.usable([A, B]) == [B]
    standings.praise(A)
    assert standings.banned(A)
    clock.now = FIRST_BAN
    assert not standings.banned(A)
    assert standings.usable([A, B]) == [A, B]


@pytest.mark.parametrize("kind", [PeerTimeout, PeerUnreachable])
def test_what_may_be_the_networks_fault_only_delays(kind: type[PeerError]) -> None:
    clock = Clock()
    standings = Standings(clock)
    standings.blame(kind("gone", peer=A))
    assert not standings.banned(A)
    assert standings.usable([A]) == []
    clock.now = FIRST_PAUSE
    assert standings.usable([A]) == [A]


@pytest.mark.parametrize("times", [1, 5])
def test_a_busy_peer_is_left_alone_as_long_as_it_asked(times: int) -> None:
    clock = Clock()
    standings = Standings(clock)
    for _ in range(times):
        standings.blame(PeerRefused(RefusalCode.BUSY, retry_after=7.0, peer=A))
    clock.now = 6.9
    assert standings.usable([A]) == []
    clock.now = 7.0
    assert standings.usable([A]) == [A]


def test_a_success_is_a_new_start() -> None:
    standings = Standings(Clock())
    standings.blame(PeerTimeout("slow", peer=A))
    standings.praise(A)
    assert standings.usable([A]) == [A]


def test_an_error_that_names_nobody_blames_nobody() -> None:
    standings = Standings(Clock())
    standings.blame(FalseClaim("forged"))
    assert standings.usable([A, PeerId("")]) == [A, PeerId("")]


def test_it_forgets_the_harmless_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.swarm.standings.MAX_KNOWN", 16)
    clock = Clock()
    standings = Standings(clock)
    for _ in range(2):
        standings.blame(IntegrityError("bad", peer=A))
    standings.blame(IntegrityError("bad", peer=B))
    for number in range(200):
        standings.blame(PeerTimeout("slow", peer=f"stranger {number}"))
    assert len(standings._known) <= 16
    assert standings.banned(A)
    assert standings.banned(B)


def test_made_up_liars_do_not_wash_away_a_long_ban(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.swarm.standings.MAX_KNOWN", 16)
    standings = Standings(Clock())
    for _ in range(2):  # the second one is longer
        standings.blame(IntegrityError("bad", peer=A))
    for number in range(200):
        standings.blame(IntegrityError("bad", peer=f"made up {number}"))
    assert len(standings._known) <= 16
    assert standings.banned(A)


def test_from_when_on_a_peer_may_be_bothered() -> None:
    clock = Clock(5.0)
    standings = Standings(clock)
    assert standings.ready_at(A) <= 5.0
    standings.blame(IntegrityError("bad", peer=A))
    assert standings.ready_at(A) == 5.0 + FIRST_BAN
