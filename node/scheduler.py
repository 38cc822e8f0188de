"""Which requests a node accepts, and which it computes together: decisions on facts, without I/O.

A request is refused at once rather than queued without bound. The worker, whenever it is free, takes the oldest request
and all others of the same model and layer: the weights are read once for all of them, and nobody waits for a batch to
fill.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from moehive.protocol.errors import RefusalCode


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a node's queue."""

    requests: int = 1024
    queued_bytes: int = 512 << 20  # request payloads held in memory
    batch_rows: int = 8192  # rows of one batch: bounds how long the others wait


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """How full the queue is, and how fast it drains."""

    requests: int
    queued_bytes: int
    rows: int
    seconds_per_row: float  # smoothed; 0 while nothing has been computed

    @property
    def expected_wait(self) -> float:
        """Seconds until a request that arrives now is begun."""
        return self.rows * self.seconds_per_row


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not queue the request."""

    code: RefusalCode
    retry_after: float  # seconds


@dataclass(frozen=True, slots=True)
class Waiting:
    """One queued request, oldest first in the queue."""

    key: Hashable  # requests with equal keys can be computed together
    rows: int


def admit(facts: QueueFacts, limits: QueueLimits, *, payload_bytes: int, deadline: float) -> Refuse | None:
    """None to queue the request, else why not."""
    if facts.requests >= limits.requests or facts.queued_bytes + payload_bytes > limits.queued_bytes:
        return Refuse(RefusalCode.BUSY, max(facts.expected_wait, 0.05))
    if facts.expected_wait > deadline:
        return Refuse(RefusalCode.DEADLINE, facts.expected_wait - deadline)
    return None


def next_batch(queue: Sequence[Waiting], limits: QueueLimits) -> list[int]:
    """Indices of the requests to compute now: the oldest, and the later ones with its key that still fit."""
    if not queue:
        return []
    chosen, rows = [0], queue[0].rows
    for index, waiting in enumerate(queue[1:], start=1):
        if waiting.key == queue[0].key and rows + waiting.rows <= limits.batch_rows:
            chosen.append(index)
            rows += waiting.rows
    return chosen
