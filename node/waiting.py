"""The requests that wait at a node, with what they sum up to kept as they come and go.

An arrival looks at sums, not at the queue: under a flood of requests those that are refused must cost next to nothing,
and the queue is long just then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from moehive.protocol.ids import PeerId

from .compute import Work
from .scheduler import QueueFacts, Waiting


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The answer to one request."""

    output: Tensor
    waited: float  # seconds in the queue
    computed: float  # seconds of the whole batch


@dataclass(frozen=True, slots=True, eq=False)
class Queued:
    """A request that was accepted."""

    work: Work
    client: PeerId
    payload_bytes: int
    since: float
    waiting: Waiting  # the same for the scheduler
    done: asyncio.Future[Result]

    @classmethod
    def begin(cls, work: Work, client: PeerId, payload_bytes: int, since: float, *, small: bool) -> Queued:
        """A request that arrives now, on the running event loop."""
        message = work.message
        waiting = Waiting((message.model, message.layer, message.dtype), message.rows, client, small)
        return cls(work, client, payload_bytes, since, waiting, asyncio.get_running_loop().create_future())


class RequestQueue:
    """Requests, oldest first."""

    def __init__(self) -> None:
        self._queued: list[Queued] = []
        self._bytes = self._rows = self._small_rows = self._small = 0
        self._requests: Counter[PeerId] = Counter()  # by client, as the next one
        self._client_bytes: Counter[PeerId] = Counter()

    @property
    def clients(self) -> Collection[PeerId]:
        """Who waits."""
        return self._requests.keys()

    @property
    def small(self) -> int:
        """How many small requests wait."""
        return self._small

    def only_small(self) -> bool:
        """Whether requests wait, and all of them are small."""
        return 0 < self._small == len(self._queued)

    @property
    def waiting(self) -> Sequence[Waiting]:
        """The requests as the scheduler sees them."""
        return [queued.waiting for queued in self._queued]

    def facts(self, client: PeerId | None, seconds_per_row: float) -> QueueFacts:
        """What `client` would queue behind, what is being computed apart."""
        return QueueFacts(
            len(self._queued), self._bytes, self._rows, seconds_per_row, self._small_rows,
            self._requests[client] if client else 0, self._client_bytes[client] if client else 0,
        )  # fmt: skip

    def add(self, queued: Queued) -> None:
        """The newest."""
        self._queued.append(queued)
        self._count(queued, 1)

    def take(self, indices: Collection[int]) -> list[Queued]:
        """Remove and return the requests at ascending `indices`."""
        taken = [self._queued[index] for index in indices]
        gone = set(indices)
        self._queued = [queued for index, queued in enumerate(self._queued) if index not in gone]
        for queued in taken:
            self._count(queued, -1)
        return taken

    def late(self, now: float) -> list[Queued]:
        """Remove whom nobody waits for any more, and remove and return those whose deadline has passed."""
        over = [
            index
            for index, queued in enumerate(self._queued)
            if queued.done.done() or now - queued.since > queued.work.message.deadline
        ]
        return [queued for queued in self.take(over) if not queued.done.done()] if over else []

    def _count(self, queued: Queued, sign: int) -> None:
        rows, size, client = queued.waiting.rows, queued.payload_bytes, queued.client
        self._bytes += sign * size
        self._rows += sign * rows
        if queued.waiting.small:
            self._small += sign
            self._small_rows += sign * rows
        self._client_bytes[client] += sign * size
        self._requests[client] += sign
        if not self._requests[client]:
            del self._requests[client], self._client_bytes[client]
