"""How fast a peer sends, and what follows from it: how many chunks to ask for at once, and how long to wait.

    depth   = clamp(ceil(rate x (round trip + 0.5 s) / 1 MiB), 2, 32) chunks on their way
    timeout = max(2 s, 4 x EWMA of the wait for a chunk), doubled with each timeout in a row

A rate is bytes per second of busy time, the last second of it counting most: idle time says nothing about a peer, so
what is known outlives an object. All times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moehive.protocol.chunks import CHUNK_SIZE

MIN_DEPTH, MAX_DEPTH = 2, 32  # chunks
HORIZON = 0.5  # seconds of work that a peer should have beyond a round trip
MIN_TIMEOUT, MAX_TIMEOUT = 2.0, 60.0
FIRST_TIMEOUT = 10.0  # for a peer that never sent a chunk: it may have to read the object, or be on a slow line
STALLED = 10.0  # seconds without a chunk, though asked, after which a connection is given up
_WAIT_MARGIN = 4.0
_MEMORY = 1.0  # seconds of busy time
_SMOOTHING = 0.25


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of one peer."""

    received: float = 0.0  # bytes, decayed
    busy: float = 0.0  # seconds in which they came, decayed
    rtt: float = 0.0  # seconds; 0: not known
    wait: float = 0.0  # EWMA: seconds from asking, or from the request's last chunk, to the next one
    limit: int = MAX_DEPTH  # chunks; low after trouble, grows with each chunk
    strikes: int = 0  # timeouts in a row
    refusals: int = 0  # in a row: it was busy
    heard: float = 0.0  # when its last chunk came, or when it was asked having nothing to do
    starting: bool = False  # the latter: a round trip passes before its next chunk
    quiet_since: float | None = None  # since when it owes us a chunk

    @property
    def rate(self) -> float:
        """Bytes per second; 0 where nothing came yet."""
        return self.received / self.busy if self.busy else 0.0

    @property
    def depth(self) -> int:
        """How many chunks should be on their way."""
        wanted = math.ceil(self.rate * (self.rtt + HORIZON) / CHUNK_SIZE)
        return min(max(wanted, MIN_DEPTH), MAX_DEPTH, self.limit)

    @property
    def timeout(self) -> float:
        """Seconds of silence after which what was asked for is asked from somebody else."""
        patience = max(MIN_TIMEOUT, _WAIT_MARGIN * self.wait) if self.wait else FIRST_TIMEOUT
        return min(patience * 2.0 ** min(self.strikes, 8), MAX_TIMEOUT)

    @property
    def reluctance(self) -> float:
        """Seconds that must be added to what could be expected of it: who was busy will probably be so again."""
        return HORIZON * (2.0 ** min(self.refusals, 8) - 1)

    def stalled(self, now: float) -> bool:
        """Whether to give the connection up and look for somebody else."""
        return self.quiet_since is not None and now - self.quiet_since >= max(STALLED, self.timeout)


def after_asking(pace: Pace, now: float, *, idle: bool) -> Pace:
    """Something was asked for; `idle`: the peer had nothing to do before."""
    quiet_since = now if pace.quiet_since is None else pace.quiet_since
    return replace(pace, heard=now if idle else pace.heard, starting=idle or pace.starting, quiet_since=quiet_since)


def after_chunk(pace: Pace, size: int, waited: float, now: float, *, more: bool) -> Pace:
    """A chunk of `size` bytes came, `waited` seconds after its request or the last chunk of that; `more` are due."""
    seconds = max(now - pace.heard, 1e-6)
    if pace.starting:
        seconds = max(seconds - pace.rtt, seconds / 4)
    kept = math.exp(-seconds / _MEMORY)
    wait = pace.wait + _SMOOTHING * (waited - pace.wait) if pace.wait else waited
    return replace(
        pace,
        received=pace.received * kept + size,
        busy=pace.busy * kept + seconds,
        wait=max(wait, 1e-6),
        limit=min(pace.limit + 1, MAX_DEPTH),
        strikes=0,
        refusals=0,
        heard=now,
        starting=False,
        quiet_since=now if more else None,
    )


def after_answer(pace: Pace, seconds: float) -> Pace:
    """A small request was answered. The shortest times are the round trip, the others include work or queueing."""
    faster = not pace.rtt or seconds < pace.rtt
    return replace(pace, rtt=seconds if faster else pace.rtt + (seconds - pace.rtt) / 16)


def after_timeout(pace: Pace, now: float) -> Pace:
    """What it was asked for did not come in time: one chunk at a time from now on, until they come again."""
    return replace(pace, limit=1, strikes=pace.strikes + 1, heard=now)


def after_busy(pace: Pace, in_flight: int) -> Pace:
    """It has too much to do: half of what was asked for is enough."""
    return replace(pace, limit=max(1, min(pace.limit, in_flight // 2)), refusals=pace.refusals + 1)


def after_release(pace: Pace) -> Pace:
    """It owes us nothing any more."""
    return replace(pace, quiet_since=None)
