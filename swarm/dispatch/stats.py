"""What each peer did for us: for choosing whom to ask, and for showing who computed how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from moehive.protocol.ids import PeerId
from moehive.protocol.messages import ExpertsDone, RunExperts
from moehive.swarm.policy.speed import Speed, after_answer, after_silence

from .planner import PeerFacts

MAX_PEERS = 1024  # of whom counters are kept


@dataclass(slots=True)
class PeerStats:
    """Counters of one peer."""

    requests: int = 0
    rows: int = 0  # (token, expert) rows computed
    bytes_sent: int = 0
    bytes_received: int = 0
    failures: int = 0
    in_flight: int = 0
    speed: Speed = field(default_factory=Speed)

    @property
    def latency(self) -> float:
        """Seconds of a typical answer."""
        return self.speed.network + self.speed.waited + self.speed.computed

    def answered(self, seconds: float, asked: RunExperts, done: ExpertsDone) -> None:
        """Count one good answer, which came after `seconds`."""
        self.requests += 1
        self.rows += asked.rows
        self.bytes_sent += asked.request_bytes
        self.bytes_received += asked.answer_bytes
        self.speed = after_answer(
            self.speed,
            elapsed=seconds,
            waited=done.waited,
            computed=done.computed,
            experts=len(asked.experts),
            rows=asked.rows,
            sent=asked.request_bytes + asked.answer_bytes,
        )

    def given_up(self, seconds: float, asked: RunExperts) -> None:
        """Count a request that was withdrawn after `seconds`, because another peer had answered."""
        self.speed = after_silence(self.speed, elapsed=seconds, experts=len(asked.experts), rows=asked.rows)


@dataclass(slots=True)
class DispatchStats:
    """Counters of one model's calls. Read anywhere; each is written by one thread: the event loop's, or the model's."""

    peers: dict[PeerId, PeerStats] = field(default_factory=dict)
    local_rows: int = 0
    passes: int = 0  # forward passes of the model
    layer_calls: int = 0
    round_trips: int = 0  # waves of requests: 1 per layer call where nothing fails
    retries: int = 0
    hedges: int = 0  # shares that were asked of a second peer because the first was late
    hedges_won: int = 0  # of those, how many the second peer answered first

    def of(self, peer: PeerId) -> PeerStats:
        """The counters of a peer. Of too many, the one met first that is not being asked is forgotten."""
        known = self.peers.get(peer)
        if known is None:
            known = self.peers[peer] = PeerStats()
            if len(self.peers) > MAX_PEERS:
                idle = (other for other, stats in self.peers.items() if not stats.in_flight and other != peer)
                if (forgotten := next(idle, None)) is not None:
                    del self.peers[forgotten]
        return known

    def facts(self, peers: Iterable[PeerId]) -> dict[PeerId, PeerFacts]:
        """What the planner needs of those of `peers` that were met: a few, where hundreds may have come and gone."""
        known = ((peer, self.peers[peer]) for peer in peers if peer in self.peers)
        return {peer: PeerFacts(stats.speed, stats.in_flight) for peer, stats in known}
