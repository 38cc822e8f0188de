"""What to delete where a disk budget is full: a decision on facts, without I/O.

Never what is pinned or in use. Never what may be the last copy: the swarm has to be known to hold another one, and not
knowing counts as no. Never a manifest before the rest of its model: nobody would know any more what that is. Abandoned
downloads go first (they are no copy of anything), then what was used longest ago, then the dense part of a model in
use, manifests last.

Why two peers that evict at the same moment cannot lose the last copy between them: what a peer announces is in use
there, so only copies that nobody counts are ever evicted, and they are evicted because of a copy that somebody keeps.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from moehive.protocol.ids import ShardHash


class Rank(enum.IntEnum):
    """What an object is to its model; the lowest goes first."""

    PARTIAL = 0  # an abandoned download
    SHARD = 1
    FOUNDATION = 2  # dense part of a model some of whose objects are in use
    MANIFEST = 3


class Kept(enum.StrEnum):
    """Why an object may not be deleted."""

    IN_USE = "in use"
    PINNED = "pinned"
    LAST_COPY = "no other peer has it"
    UNKNOWN = "not known whether another peer has it"
    NEEDED = "manifest of a model of which something is kept"


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
    dependants: frozenset[ShardHash] = frozenset()  # objects that mean nothing without it; they have none themselves


@dataclass(frozen=True, slots=True)
class Eviction:
    """What to delete, in this order, and how many bytes that frees; they may be fewer than were asked for."""

    victims: tuple[ObjectFacts, ...]
    freed: int


def kept(objects: Collection[ObjectFacts], *, force: bool = False) -> dict[ShardHash, Kept]:
    """The objects that have to stay, and why. `force`: the user takes the risk that something is the last copy."""
    reasons = {facts.hash: reason for facts in objects if (reason := _own_reason(facts, force))}
    needed = {facts.hash: Kept.NEEDED for facts in objects if not facts.dependants.isdisjoint(reasons)}
    return needed | reasons


def plan_eviction(objects: Collection[ObjectFacts], needed: int, *, force: bool = False) -> Eviction:
    """The objects to give up for `needed` bytes, none of which could stay without falling short.

    Where all that may go is not enough, that is the answer; it is the caller's to do nothing then.
    """
    stay = kept(objects, force=force)
    eligible = [facts for facts in objects if facts.hash not in stay]
    eligible.sort(key=lambda facts: (facts.rank, facts.last_used, facts.hash))
    chosen: dict[ShardHash, ObjectFacts] = {}
    freed = 0
    for facts in eligible:
        if freed >= needed:
            break
        if facts.dependants <= chosen.keys():
            chosen[facts.hash] = facts
            freed += facts.size
    for facts in reversed(tuple(chosen.values())):  # the last ones may have made some of the first superfluous
        depended_on = any(facts.hash in other.dependants for other in chosen.values() if other.dependants)
        if freed - facts.size >= needed and not depended_on:
            freed -= facts.size
            del chosen[facts.hash]
    return Eviction(tuple(chosen.values()), freed)


def _own_reason(facts: ObjectFacts, force: bool) -> Kept | None:
    """Why an object has to stay for its own sake."""
    if facts.in_use:
        return Kept.IN_USE
    if facts.pinned:
        return Kept.PINNED
    if force or facts.rank is Rank.PARTIAL:
        return None
    if facts.copies is None:
        return Kept.UNKNOWN
    return None if facts.copies > 0 else Kept.LAST_COPY
