"""Counters of peers do not grow with the number of peers that ever were."""

from __future__ import annotations

import pytest

from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch import stats as module
from moehive.swarm.dispatch.stats import DispatchStats


def test_the_peer_that_was_met_first_and_is_not_being_asked_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 3)
    stats = DispatchStats()
    stats.of(PeerId("busy")).in_flight = 1
    for name in ("first", "second", "third"):
        stats.of(PeerId(name)).requests = 7
    assert list(stats.peers) == ["busy", "second", "third"]
    assert stats.of(PeerId("third")).requests == 7
    assert stats.of(PeerId("first")).requests == 0
    assert list(stats.peers) == ["busy", "third", "first"]
