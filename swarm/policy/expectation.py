"""When chunks can be expected from peers: each has a queue, a rate, and a last sign of life.

A peer's next chunk comes a chunk time after its last one. What is overdue is expected to be so for as long again, and
who is silent for several chunk times to stay silent for as long again (Lindy's law), so that its chunks look later and
later until they are asked elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from moehive.protocol.bits import Bits, span
from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.ids import PeerId

from .pace import Pace

ItemKey = NewType("ItemKey", str)  # one download; two of them may be for the same object

GUESSED_RTT = 0.05  # seconds
SILENCE = 4.0  # chunk times without a chunk that are nothing unusual: requests to one peer take turns
FIRST_CHUNK = 0.1  # seconds that nobody wonders about besides, where a peer's rate is not known


@dataclass(frozen=True, slots=True)
class Flight:
    """A request that is under way: its chunks from `next` to `stop` have not come yet."""

    number: int  # ascending in the order of asking
    peer: PeerId
    item: ItemKey
    next: int
    stop: int
    heard: float  # when it was asked, or its last chunk came

    @property
    def count(self) -> int:
        """How many chunks are still to come."""
        return self.stop - self.next

    @property
    def bits(self) -> Bits:
        """Which ones."""
        return span(self.next, self.count)


@dataclass(slots=True)
class Queue:
    """What one peer has to send. A new chunk would come at `base + gap`, the one after that at `base + 2 gap`."""

    first: float  # seconds from now until the first one that is under way
    gap: float  # seconds per chunk
    base: float  # seconds from now until all that is under way has come
    rtt: float
    silent: bool = False  # it should have sent something by now

    def when(self, number: int) -> float:
        """Seconds until the `number`-th new chunk would come, counted from 1."""
        return self.base + number * self.gap

    def sooner_than(self, seconds: float) -> int:
        """How many new chunks would come sooner than that."""
        return max(0, math.ceil((seconds - self.base) / self.gap) - 1)

    def add(self, count: int) -> None:
        """New chunks were asked for."""
        self.base += count * self.gap


def queue_of(pace: Pace, flights: Sequence[Flight], now: float, guessed_rate: float) -> Queue:
    """What can be expected of a peer; `guessed_rate` (bytes per second) stands in where it never sent a chunk."""
    gap, rtt = CHUNK_SIZE / (pace.rate or guessed_rate), pace.rtt or GUESSED_RTT
    silence = now - pace.heard
    unusual = SILENCE * gap + rtt + (0.0 if pace.rate else FIRST_CHUNK)
    silent = bool(flights) and silence > unusual
    first = silence if silent else abs(gap + rtt - silence)  # overdue: it may take as long again
    due = sum(flight.count for flight in flights)
    base = max(rtt, first + (due - 1) * gap) if due else rtt
    return Queue(first, gap, base + pace.reluctance, rtt, silent)


def is_late(pace: Pace, flights: Sequence[Flight], now: float) -> bool:
    """Nothing came for a timeout, though asked; or one request waits far longer than the others."""
    return bool(flights) and now >= late_at(pace, flights)


def late_at(pace: Pace, flights: Sequence[Flight]) -> float:
    """When `is_late` comes true if nothing happens until then."""
    heard = [flight.heard for flight in flights]
    return min(max(pace.heard, *heard) + pace.timeout, min(heard) + SILENCE * pace.timeout)
