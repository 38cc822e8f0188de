"""What a peer should hold from now on, after others have come and gone: a decision on facts, without I/O.

Every peer decides by itself, from the same announcements seen at slightly different moments, and nobody coordinates
them. So that not all of them take the same expert, or leave it, each has a rank for each layer that everybody can
compute (rendezvous hashing): of the peers that could take an expert the first ones do, and of those that hold too many
copies the last ones leave theirs. Who does not act, because it is full or told what to hold, is passed over: with every
look at which an expert still lacks a holder, twice as many peers feel meant, and whose turn it is to leave changes with
the time.

The floor matters more than popularity: at the skew that models have, a second and third holder of everything is what
keeps them usable when peers go. What is left goes to what is asked for most, by its holder, and with hysteresis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from moehive.protocol.ids import ExpertKey, PeerId

FLOOR = 2  # holders that each expert should have: any one of them may go at any time
CONSIDERED = 512  # experts that one look thinks about; the next look sees what has become of them
HOTTER = 2.0  # times the demand for each holder: what a swap must gain
_PATIENT = 1  # looks before an expert that has a holder left counts as lacking one: restarts take as long

Holders = Mapping[ExpertKey, Collection[PeerId]]


@dataclass(frozen=True, slots=True)
class Place:
    """How many experts a peer has room for."""

    fast: int  # in the form that is computed with
    most: int  # as they are stored, which is slower: only for what nobody else holds


@dataclass(frozen=True, slots=True)
class View:
    """What a peer sees of a model in its swarm."""

    us: PeerId
    peers: Collection[PeerId]  # that announce the model
    holders: Holders  # of each expert, without us; absent: none
    held: frozenset[ExpertKey]  # by us
    obtainable: frozenset[ExpertKey]  # that we have on disk, or could fetch
    lacking: Mapping[ExpertKey, int] = field(default_factory=dict)  # looks at which it lacked holders already
    demand: Mapping[ExpertKey, float] = field(default_factory=dict)  # rows per second asked of all its holders
    turn: int = 0  # goes up with the time, equally for all peers
    certain: Holders | None = None  # of `holders`, those that confirmed it just now; None: nobody was asked


@dataclass(frozen=True, slots=True)
class Change:
    """Experts to take, the most urgent first, and experts to leave for them."""

    take: tuple[ExpertKey, ...] = ()
    leave: frozenset[ExpertKey] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.take or self.leave)


def rebalance(view: View, place: Place, *, floor: int = FLOOR) -> Change:
    """What to take and to leave. No expert falls below `floor` holders because of it where all peers see the same.

    First what nobody holds, then what too few hold, then what is asked for much more, for each of its holders, than
    what is left for it.
    """
    ranks = _Ranks()
    spare = _spare(view, floor, ranks)
    take: list[ExpertKey] = []
    leave: list[ExpertKey] = []
    used = len(view.held)
    for key in _wanted(view, floor, ranks):
        if used >= place.fast and spare:
            leave.append(spare.pop())
        elif used < (place.fast if view.holders.get(key) else place.most):
            used += 1
        else:
            continue
        take.append(key)
    for key in _hot(view, floor, frozenset(take), ranks):
        if used < place.fast:
            used += 1
        elif spare and _per_holder(view, key, 1) > HOTTER * _per_holder(view, spare[-1], 0):
            leave.append(spare.pop())
        else:
            break  # what follows is asked for less
        take.append(key)
    while used > place.fast and spare:  # what was taken as it is stored makes way once others hold it
        leave.append(spare.pop())
        used -= 1
    return Change(tuple(take), frozenset(leave))


def lacking(view: View, *, floor: int = FLOOR) -> dict[ExpertKey, int]:
    """`View.lacking` for the next look."""
    return {
        key: view.lacking.get(key, 0) + 1
        for key in view.obtainable - view.held
        if len(view.holders.get(key, ())) < floor
    }


def _wanted(view: View, floor: int, ranks: _Ranks) -> list[ExpertKey]:
    """Experts that lack holders and that it is our turn to take; those with the fewest first."""
    few = [key for key in sorted(view.obtainable - view.held) if len(view.holders.get(key, ())) < floor]
    few.sort(key=lambda key: (len(view.holders.get(key, ())), -view.lacking.get(key, 0)))
    missing = {key: floor - len(view.holders.get(key, ())) for key in few[:CONSIDERED]}
    return [key for key, count in missing.items() if _is_our_turn(view, key, count, ranks)]


def _is_our_turn(view: View, key: ExpertKey, missing: int, ranks: _Ranks) -> bool:
    """Whether we are among the first `missing` of those that could take it, or of twice as many after each look.

    Ranks are those of its layer, so that what one peer takes lies together.
    """
    waited = view.lacking.get(key, 0) - (_PATIENT if view.holders.get(key) else 0)
    return waited >= 0 and _before_us(view, key, ranks[str(key.layer)]) < missing << min(waited, 32)


def _before_us(view: View, key: ExpertKey, ranks: _Subject) -> int:
    """Peers that do not hold an expert and rank before us."""
    holders, ours = frozenset(view.holders.get(key, ())), ranks[view.us]
    return sum(peer not in holders and ranks[peer] < ours for peer in view.peers)


def _spare(view: View, floor: int, ranks: _Ranks) -> list[ExpertKey]:
    """What we hold and may leave in this turn; what is needed least stands last.

    Of an expert's holders the last ones may, as many as are too many: others each turn, as some cannot choose. Who
    announces it and does not answer is no holder here: a killed peer is announced for more than a minute.
    """
    spare, sure = [], view.holders if view.certain is None else view.certain
    for key in view.held:
        holders, rank = sure.get(key, ()), ranks[f"{key.layer} {view.turn}"]
        behind = sum(rank[peer] > rank[view.us] for peer in holders)
        if behind <= len(holders) - floor:
            spare.append(key)
    return sorted(spare, key=lambda key: (-_per_holder(view, key, 0), len(sure[key]), key))


def _hot(view: View, floor: int, taken: Collection[ExpertKey], ranks: _Ranks) -> list[ExpertKey]:
    """What is asked for, has holders enough, and is our turn to take; what is asked most of each holder first."""
    hot = [key for key in sorted(view.obtainable - view.held) if view.demand.get(key) and key not in taken]
    hot = [key for key in hot if len(view.holders.get(key, ())) >= floor]
    hot.sort(key=lambda key: -_per_holder(view, key, 1))
    return [key for key in hot[:CONSIDERED] if not _before_us(view, key, ranks[f"hot {key.layer} {view.turn}"])]


def _per_holder(view: View, key: ExpertKey, more: int) -> float:
    """Rows per second that each other holder would be asked for, if there were so many `more`."""
    return view.demand.get(key, 0.0) / max(1, len(view.holders.get(key, ())) + more)


class _Subject(dict[PeerId, bytes]):
    """Ranks of peers for one subject, made when they are asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, peer: PeerId) -> bytes:
        rank = self[peer] = hashlib.blake2b(f"{self._name} {peer}".encode(), digest_size=8).digest()
        return rank


class _Ranks(dict[str, _Subject]):
    """For a look: of a thousand peers and some hundred subjects."""

    def __missing__(self, name: str) -> _Subject:
        subject = self[name] = _Subject(name)
        return subject
