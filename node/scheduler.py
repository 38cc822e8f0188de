"""Which requests a node accepts, and which it computes next: decisions on facts, without I/O.

A request is refused at once rather than queued without bound. The worker, whenever it is free, takes what waits for one
model and layer together: the weights are read once for all of it, and nobody waits for a batch to fill. Clients are
served alike: whoever has been served least goes first (start-time fair queueing, Goyal, Vin and Cheng, 1996). Small
requests (decoding) go before large ones (prefill), which are computed a slice at a time in between, turn by turn: a
small one waits for one slice at most, and a large one for one small batch.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moehive.protocol.errors import RefusalCode


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of a node's queue."""

    requests: int = 1024
    queued_bytes: int = 512 << 20  # request payloads held in memory
    client_requests: int = 256  # of one client, so that none fills the queue alone
    client_bytes: int = 256 << 20
    wait: float = 5.0  # seconds until a request is begun; longer ones are better asked elsewhere
    batch_rows: int = 8192  # rows computed together
    small_tokens: int = 16  # a request of more tokens is a large one
    slice_rows: int = 512  # rows of a large batch after which small ones have their turn


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """How full the queue is, and how fast it drains."""

    requests: int
    queued_bytes: int
    rows: int
    seconds_per_row: float  # smoothed; 0 while nothing has been computed
    small_rows: int = 0  # of `rows`, those of small requests
    client_requests: int = 0  # of the client that asks
    client_bytes: int = 0

    @property
    def expected_wait(self) -> float:
        """Seconds until all that waits now is computed."""
        return self.rows * self.seconds_per_row

    def wait_of(self, small: bool, limits: QueueLimits) -> float:
        """Seconds until a request that arrives now is begun, as far as can be said."""
        if not small:
            return self.expected_wait
        slices = min(self.rows - self.small_rows, self.small_rows + limits.slice_rows)  # turn by turn
        return (self.small_rows + slices) * self.seconds_per_row


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
    client: Hashable = ""
    small: bool = True


def admit(
    facts: QueueFacts, limits: QueueLimits, *, payload_bytes: int, deadline: float, small: bool = True
) -> Refuse | None:
    """None to queue the request, else why not, and when to come back."""
    wait = facts.wait_of(small, limits)
    full = facts.requests >= limits.requests or facts.queued_bytes + payload_bytes > limits.queued_bytes
    greedy = facts.client_requests >= limits.client_requests or facts.client_bytes + payload_bytes > limits.client_bytes
    if full or greedy:
        return Refuse(RefusalCode.BUSY, max(wait, 0.05))
    if wait > deadline:
        return Refuse(RefusalCode.DEADLINE, wait - deadline)
    if wait > limits.wait:
        return Refuse(RefusalCode.BUSY, wait - limits.wait)
    return None


def next_batch(
    queue: Sequence[Waiting], limits: QueueLimits, served: Mapping[Hashable, float], *, small: bool = True
) -> list[int]:
    """Indices, ascending, of the requests to compute now; empty where none of that size waits.

    The oldest request of the client that has been `served` least, and what else has its key and still fits, in the same
    order of clients.
    """
    order = sorted(
        (index for index, waiting in enumerate(queue) if waiting.small is small),
        key=lambda index: (served.get(queue[index].client, 0.0), index),
    )
    chosen: list[int] = []
    rows = 0
    for index in order:
        waiting = queue[index]
        if not chosen or (waiting.key == queue[order[0]].key and rows + waiting.rows <= limits.batch_rows):
            chosen.append(index)
            rows += waiting.rows
    return sorted(chosen)


# --- fairness ---------------------------------------------------------------------------------------------------------


def arrived(served: Mapping[Hashable, float], client: Hashable, waiting: Collection[Hashable]) -> dict[Hashable, float]:
    """What clients have been served, when a request of `client` joins those of the `waiting` ones.

    Who was away earns nothing by it: it starts level with the one that has been served least of those who wait.
    """
    floor = min((served.get(other, 0.0) for other in waiting), default=0.0)
    return {**served, client: max(served.get(client, 0.0), floor)}


def computed(
    served: Mapping[Hashable, float], batch: Iterable[Waiting], waiting: Collection[Hashable]
) -> dict[Hashable, float]:
    """What clients have been served, after `batch`; who is level with or below all that wait is forgotten."""
    after = dict(served)
    for request in batch:
        after[request.client] = after.get(request.client, 0.0) + request.rows
    floor = min((after.get(client, 0.0) for client in waiting), default=float("inf"))
    return {client: rows for client, rows in after.items() if client in waiting or rows > floor}
