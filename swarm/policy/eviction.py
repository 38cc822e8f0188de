"""What to delete where a disk budget is full: a decision on facts, without I/O.

Never what is pinned or in use. Never what may be the last copy: the swarm has to be known to hold another one, and not
knowing counts as no. Abandoned downloads go first (they are no copy of anything), then what was used longest ago; the
manifest and the dense part of a model in use, on which its other objects depend, go last.

Why two peers that evict at the same moment cannot lose the last copy between them: what a peer announces is in use
there, so only copies that nobody counts are ever evicted, and they are evicted because of a copy that somebody keeps.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from moehive.protocol.ids import ShardHash


class Rank(enum.IntEnum):
    """What an object is to its model; the lowest goes first."""

    PARTIAL = 0  # an abandoned download
    SHARD = 1
    FOUNDATION = 2  # manifest or dense part of a model some of whose objects are in use


class Kept(enum.StrEnum):
    """Why an object may not be deleted."""

    IN_USE = "in use"
    PINNED = "pinned"
    LAST_COPY = "no other peer has it"
    UNKNOWN = "not known whether another peer has it"


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """One object of a store."""

    hash: ShardHash
    size: int  # bytes
    last_used: float  # seconds of any clock; a hint that may be wrong
    rank: Rank = Rank.SHARD
    pinned: bool = False
    in_use: bool = False
    copies: int | None = None  # peers that hold it, without this machine; None: nobody could be asked


@dataclass(frozen=True, slots=True)
class Eviction:
    """What to delete, in this order, and how many bytes that frees; they may be fewer than were asked for."""

    victims: tuple[ObjectFacts, ...]
    freed: int


def kept_because(facts: ObjectFacts, *, force: bool = False) -> Kept | None:
    """Why an object has to stay; None where it may go. `force`: the user takes the risk that it is the last copy."""
    if facts.in_use:
        return Kept.IN_USE
    if facts.pinned:
        return Kept.PINNED
    if force or facts.rank is Rank.PARTIAL:
        return None
    if facts.copies is None:
        return Kept.UNKNOWN
    return None if facts.copies > 0 else Kept.LAST_COPY


def plan_eviction(objects: Iterable[ObjectFacts], needed: int, *, force: bool = False) -> Eviction:
    """The objects to give up for `needed` bytes, none of which could stay without falling short.

    Where all that may go is not enough, that is the answer; it is the caller's to do nothing then.
    """
    eligible = [facts for facts in objects if kept_because(facts, force=force) is None]
    eligible.sort(key=lambda facts: (facts.rank, facts.last_used, facts.hash))
    chosen: list[ObjectFacts] = []
    freed = 0
    for facts in eligible:
        if freed >= needed:
            break
        chosen.append(facts)
        freed += facts.size
    victims = []
    for facts in reversed(chosen):  # the last ones may have made some of the first superfluous
        if freed - facts.size >= needed:
            freed -= facts.size
        else:
            victims.append(facts)
    return Eviction(tuple(reversed(victims)), freed)
