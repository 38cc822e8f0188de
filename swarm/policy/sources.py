"""Which of the peers that have an object to connect to: a decision on facts, without I/O."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from moehive.protocol.ids import PeerId

FULL = 6  # peers at once that have all of an object; a link is seldom faster than that
PARTIAL = 4  # peers at once that may have parts: each is asked which, so their number is small


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that may supply an object."""

    connected: bool = False
    rate: float = 0.0  # bytes per second; 0: not known
    ready_at: float = 0.0  # it is to be left alone until then
    partial: bool = False
    last_resort: bool = False


def choose(candidates: Mapping[PeerId, Candidate], now: float, seed: str) -> list[PeerId]:
    """Whom to use: peers we are connected to, the fastest first, and strangers in an order of our own.

    One place is always for a stranger, or a faster peer would never be found. A last resort is chosen where nobody else
    has all of it.
    """
    usable = {peer: candidate for peer, candidate in candidates.items() if candidate.ready_at <= now}
    order = sorted(usable)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda peer: (not usable[peer].connected, -usable[peer].rate))  # stable: the shuffle decides
    regular = [peer for peer in order if not usable[peer].last_resort]
    full = _with_stranger([peer for peer in regular if not usable[peer].partial], usable, FULL)
    partial = _with_stranger([peer for peer in regular if usable[peer].partial], usable, PARTIAL)
    seeds = [] if full else [peer for peer in order if usable[peer].last_resort]
    return [*full, *partial, *seeds]


def _with_stranger(order: list[PeerId], usable: Mapping[PeerId, Candidate], count: int) -> list[PeerId]:
    chosen = order[:count]
    if len(order) > count and all(usable[peer].connected for peer in chosen):
        stranger = next((peer for peer in order[count:] if not usable[peer].connected), None)
        if stranger is not None:
            chosen[-1] = stranger
    return chosen
