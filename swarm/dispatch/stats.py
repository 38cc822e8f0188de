"""What each peer did for us: for choosing whom to ask, and for showing who computed how much."""

from __future__ import annotations

from dataclasses import dataclass, field

from moehive.protocol.ids import PeerId

from .planner import UNKNOWN_LATENCY, PeerFacts

_SMOOTHING = 0.2  # weight of the newest answer


@dataclass(slots=True)
class PeerStats:
    """Counters of one peer."""

    requests: int = 0
    rows: int = 0  # (token, expert) rows computed
    bytes_sent: int = 0
    bytes_received: int = 0
    failures: int = 0
    in_flight: int = 0
    latency: float = UNKNOWN_LATENCY  # seconds, exponentially smoothed

    def answered(self, seconds: float, *, rows: int, sent: int, received: int) -> None:
        """Count one good answer."""
        self.latency = seconds if not self.requests else self.latency + _SMOOTHING * (seconds - self.latency)
        self.requests += 1
        self.rows += rows
        self.bytes_sent += sent
        self.bytes_received += received


@dataclass(slots=True)
class DispatchStats:
    """Counters of one model's calls. Read anywhere; each is written by one thread: the event loop's, or the model's."""

    peers: dict[PeerId, PeerStats] = field(default_factory=dict)
    local_rows: int = 0
    layer_calls: int = 0
    round_trips: int = 0  # waves of requests: 1 per layer call where nothing fails
    retries: int = 0

    def of(self, peer: PeerId) -> PeerStats:
        """The counters of a peer."""
        return self.peers.setdefault(peer, PeerStats())

    @property
    def facts(self) -> dict[PeerId, PeerFacts]:
        """What the planner needs."""
        return {peer: PeerFacts(stats.latency, stats.in_flight) for peer, stats in self.peers.items()}
