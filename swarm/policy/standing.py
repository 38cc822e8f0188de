"""How a peer's behaviour counts against it: a lie bans, a failure only makes us wait.

Rules: whatever is proven (a chunk that does not match its hash, a signature that is not true, an announced expert that
is refused) bans the peer, doubling with each proof. Whatever may be the network's fault (timeouts, broken connections)
never bans; the peer is passed over for a moment, doubling while it lasts, until it announces itself anew, and all is
forgotten at the first success. A busy peer did nothing wrong: it is passed over for as long as it asked.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moehive.protocol.ids import PeerId

FIRST_BAN = 60.0  # seconds
MAX_BAN = 24 * 3600.0
FIRST_PAUSE = 0.5
MAX_PAUSE = 30.0
MIN_WAIT = 0.05  # for a busy peer that does not say how long


class Offence(enum.Enum):
    """What went wrong with a peer."""

    LIE = "lie"  # proven: bad bytes, false claim, broken protocol
    FAILURE = "failure"  # unreachable, timeout, internal error: perhaps not its fault
    BUSY = "busy"  # it said so


@dataclass(frozen=True, slots=True)
class Standing:
    """What we remember of one peer. Times are seconds of the caller's clock."""

    lies: int = 0
    failures: int = 0  # in a row
    avoid_until: float = -math.inf  # a clock may begin below zero, or jump there
    banned: bool = False  # the current avoidance is a ban


def after_offence(standing: Standing, offence: Offence, now: float, *, wait: float = 0.0) -> Standing:
    """The standing after an offence; `wait` is how long the peer itself asked us to stay away."""
    if offence is Offence.LIE:
        until = now + _doubled(FIRST_BAN, standing.lies, MAX_BAN)
        return replace(standing, lies=standing.lies + 1, avoid_until=max(until, standing.avoid_until), banned=True)
    busy = offence is Offence.BUSY
    least = MIN_WAIT if busy else _doubled(FIRST_PAUSE, standing.failures, MAX_PAUSE)
    until = max(now + max(least, min(wait, MAX_PAUSE)), standing.avoid_until)
    failures = standing.failures + (not busy)
    return replace(standing, failures=failures, avoid_until=until, banned=is_banned(standing, now))


def after_success(standing: Standing, now: float) -> Standing:
    """The standing after a good answer: failures are forgotten, lies and a running ban are not."""
    return standing if is_banned(standing, now) else Standing(lies=standing.lies)


def after_return(standing: Standing, now: float) -> Standing:
    """The standing of a peer that announces itself anew: it may be tried at once, wherever it was while it failed.

    Its failures stay counted, so that it is tried with a cheap question first. What it asked for when it was busy, and
    bans, stay as they are.
    """
    if not standing.failures or is_banned(standing, now):
        return standing
    return replace(standing, avoid_until=min(standing.avoid_until, now))


def least_needed(standings: Mapping[PeerId, Standing], count: int) -> list[PeerId]:
    """Which `count` standings to forget: those that say nothing any more, then those whose time is over soonest."""
    return sorted(standings, key=lambda peer: (standings[peer].lies > 0, standings[peer].avoid_until))[:count]


def is_avoided(standing: Standing, now: float) -> bool:
    """Whether to pass the peer over now."""
    return now < standing.avoid_until


def is_banned(standing: Standing, now: float) -> bool:
    """Whether the peer is banned now."""
    return standing.banned and now < standing.avoid_until


def _doubled(first: float, times: int, most: float) -> float:
    return min(first * 2.0 ** min(times, 64), most)  # a peer may be away for thousands of attempts
