"""Whether to wait a moment for requests that are about to come: a decision on facts, without I/O.

Who has just been answered often asks again at once, for the next token. A few requests that came while a large batch
was computed would then be a batch of their own, which reads the same weights for little, while all the others queue
behind it. So where fewer than half of the requests that are in flight wait, the rest is waited for: no longer than the
last batch took, never where a single request is in flight, and seldom where it was for nothing the last time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MOST = 0.05  # seconds after an answer in which whoever got it may be waited for
_MOST_FAILURES = 6  # that are counted: one try in 64 batches


@dataclass(frozen=True, slots=True)
class Gathering:
    """What was answered last, and what came of waiting before."""

    in_flight: int = 0  # requests that were answered last, with those that waited meanwhile
    until: float = 0.0  # when it is too late to wait for them
    skip: int = 0  # batches to begin at once
    failures: int = 0  # times in a row that too few came


def patience(gathering: Gathering, waiting: int, now: float) -> float:
    """Seconds for which `waiting` requests should wait for more; 0: begin."""
    if gathering.skip or gathering.in_flight <= 1 or 2 * waiting >= gathering.in_flight:
        return 0.0
    return max(gathering.until - now, 0.0)


def gathered(gathering: Gathering, waiting: int) -> Gathering:
    """After waiting for more, with so many there now."""
    if 2 * waiting >= gathering.in_flight:
        return replace(gathering, failures=0)
    failures = min(gathering.failures + 1, _MOST_FAILURES)
    return replace(gathering, failures=failures, skip=2**failures)


def answered(gathering: Gathering, *, requests: int, waiting: int, seconds: float, now: float) -> Gathering:
    """After a batch of so many requests that took `seconds`, while so many others wait."""
    return replace(
        gathering, in_flight=requests + waiting, until=now + min(seconds, MOST), skip=max(gathering.skip - 1, 0)
    )
