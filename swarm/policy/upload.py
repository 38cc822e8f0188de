"""Whose upload runs next, who must come back later, and how fast bytes may leave: decisions on facts, without I/O.

An upload is one answer, a chunk of at most 1 MiB. A few run at the same time; the others wait, and the peers among
them take turns, so that each of N downloaders gets every N-th chunk however many requests it has open. Memory is
bounded by what runs, not by who asks. Slots as in BitTorrent's choking (BEP 3), round robin as its seeds do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.ids import PeerId

MIN_RATE = 64e3  # bytes per second: slower, a chunk takes longer than its receiver waits
MIN_RETRY = 0.05  # seconds; what a refused peer is told at least
MAX_RETRY = 30.0
BURST = 0.05  # seconds of the rate that may leave at once after a pause


# --- turns ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """How much is sent at the same time, and how many wait."""

    slots: int = 8  # uploads at the same time
    slots_per_peer: int = 4
    waiting: int = 256  # peers that may wait for a turn; requests too
    waiting_per_peer: int = 32  # requests
    slot_seconds: float = 5.0  # an upload that lasts longer (its reader is slow) gives its slot to somebody else
    slow: int = 32  # uploads that go on without a slot; more of them keep theirs


@dataclass(frozen=True, slots=True)
class Running:
    """An upload under way."""

    peer: PeerId
    since: float  # seconds of the caller's clock


@dataclass(frozen=True, slots=True)
class Place:
    """Where a new request waits."""

    refused: bool = False
    displaces: int | None = None  # index of the waiting request that is refused instead


def slots_at(rate: float | None, limits: UploadLimits) -> UploadLimits:
    """The limits where only `rate` bytes per second may leave: so few slots that a chunk does not take long."""
    if rate is None:
        return limits
    return replace(limits, slots=max(min(limits.slots, int(rate * limits.slot_seconds / CHUNK_SIZE)), 1))


def free_slots(running: Sequence[Running], limits: UploadLimits, now: float) -> int:
    """How many uploads may begin now; negative while slow ones keep their slots."""
    slow = sum(now - upload.since >= limits.slot_seconds for upload in running)
    return limits.slots - len(running) + min(slow, limits.slow)


def next_turn(
    waiting: Sequence[PeerId],
    running: Sequence[Running],
    turns: Mapping[PeerId, int],
    limits: UploadLimits,
    now: float,
) -> int | None:
    """Index in `waiting` (oldest first) of the request to serve now; None for none.

    `turns` numbers the last turn of each peer, ascending: whoever waits longest since then is next.
    """
    if not waiting or free_slots(running, limits, now) <= 0:
        return None
    used = Counter(upload.peer for upload in running)
    oldest: dict[PeerId, int] = {}
    for index, peer in enumerate(waiting):
        oldest.setdefault(peer, index)
    able = [index for peer, index in oldest.items() if used[peer] < limits.slots_per_peer]
    return min(able, key=lambda index: (turns.get(waiting[index], -1), index), default=None)


def find_place(waiting: Sequence[PeerId], peer: PeerId, limits: UploadLimits) -> Place:
    """Whether one more request of `peer` may wait.

    Where the list is full, the newest request of the peer that has most of them makes room for one of a peer that has
    fewer: as many peers as the list is long always find a place, so none of them starves.
    """
    counts = Counter(waiting)
    if counts[peer] >= limits.waiting_per_peer:
        return Place(refused=True)
    if len(waiting) < limits.waiting:
        return Place()
    greedy, most = counts.most_common(1)[0]
    if most <= counts[peer] + 1:
        return Place(refused=True)
    return Place(displaces=max(index for index, other in enumerate(waiting) if other == greedy))


def retry_after(waiting: int, seconds_each: float, limits: UploadLimits) -> float:
    """What to tell a peer that is refused: the seconds until the requests that wait now will have been served."""
    return min(max(waiting * seconds_each / limits.slots, MIN_RETRY), MAX_RETRY)


# --- rate -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: the bytes that may leave at once, as of a time. Below zero: what was sent ahead."""

    level: float = 0.0
    at: float = 0.0  # seconds of the caller's clock


def draw(bucket: Bucket, size: int, rate: float, now: float) -> tuple[Bucket, float]:
    """Take `size` bytes at `rate` bytes per second: the bucket afterwards, and how many seconds to wait before sending.

    A clock that jumps back costs nothing, one that jumps ahead one burst.
    """
    assert rate > 0
    level = min(bucket.level + max(now - bucket.at, 0.0) * rate, rate * BURST) - size
    return Bucket(level, now), max(-level / rate, 0.0)
