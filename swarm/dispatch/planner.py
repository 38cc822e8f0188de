"""Which peer computes which experts of one layer: a decision on facts, without I/O.

A layer costs one round trip, however many experts it needs, and takes as long as its slowest peer. So each expert goes
where it is expected to be done first, and a further peer is asked only if that saves more than one more request costs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moehive.protocol.ids import PeerId
from moehive.swarm.policy.speed import Speed, expected_seconds

REQUEST_COST = 0.0005  # seconds of our own processor for one more request: making it, reading its answer


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What we know of a peer."""

    speed: Speed = field(default_factory=Speed)
    in_flight: int = 0  # requests of ours that it has not answered


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Experts to compute here, experts to ask for by peer (ascending within one), experts that nobody usable holds."""

    local: tuple[int, ...]
    remote: Mapping[PeerId, tuple[int, ...]]
    missing: tuple[int, ...]


def plan_layer(
    rows: Mapping[int, int],
    *,
    local: Collection[int],
    holders: Mapping[int, Sequence[PeerId]],
    facts: Mapping[PeerId, PeerFacts],
    row_bytes: int = 0,
) -> LayerPlan:
    """Give each expert in `rows` (expert -> number of rows) to this machine or to one of its `holders`.

    `row_bytes` are those of a row on its way there and back. Experts with the fewest holders are placed first, among
    them those with the most rows: what has a choice is fitted around what has none. Ties go to the peer that is asked
    for most already, then to the greater id, so that equal facts give an equal plan.
    """
    wanted = [expert for expert in rows if expert not in local]
    if (only := _only_choice(wanted, holders)) is not None:
        return LayerPlan(tuple(sorted(expert for expert in rows if expert in local)), {only: tuple(sorted(wanted))}, ())
    placeable = [expert for expert in wanted if holders.get(expert)]
    order = sorted({peer for expert in placeable for peer in holders[expert]}, reverse=True)
    shares = {peer: _Share(facts.get(peer, PeerFacts()), row_bytes) for peer in order}
    rank = {peer: place for place, peer in enumerate(order)}
    for expert in sorted(placeable, key=lambda expert: (len(holders[expert]), -rows[expert], expert)):
        best = holders[expert][0]
        if len(holders[expert]) > 1:
            best = min(holders[expert], key=lambda peer: (*shares[peer].cost_of(rows[expert]), rank[peer]))
        shares[best].take(expert, rows[expert])
    _merge(shares, rows, holders)
    return LayerPlan(
        local=tuple(sorted(expert for expert in rows if expert in local)),
        remote={peer: tuple(sorted(shares[peer].experts)) for peer in sorted(shares) if shares[peer].experts},
        missing=tuple(sorted(set(wanted) - set(placeable))),
    )


def _only_choice(wanted: Collection[int], holders: Mapping[int, Sequence[PeerId]]) -> PeerId | None:
    """The one peer that all of it can be asked of, where none of it could be asked of another."""
    choices = {tuple(holders.get(expert, ())) for expert in wanted}
    return choice[0] if len(choices) == 1 and len(choice := next(iter(choices))) == 1 else None


class _Share:
    """What one peer is asked for so far."""

    def __init__(self, facts: PeerFacts, row_bytes: int) -> None:
        self._facts = facts
        self._row_bytes = row_bytes
        self._rows = 0
        self.experts: list[int] = []

    def done_with(self, experts: int, rows: int) -> float:
        """Seconds until the answer, with so many more experts and rows."""
        rows += self._rows
        return expected_seconds(
            self._facts.speed,
            experts=len(self.experts) + experts,
            rows=rows,
            sent=rows * self._row_bytes,
            in_flight=self._facts.in_flight,
        )

    def cost_of(self, rows: int) -> tuple[float, int]:
        """Of one more expert: seconds until it is done here; among equals, who has more already is cheaper."""
        return self.done_with(1, rows) + (0.0 if self.experts else REQUEST_COST), -len(self.experts)

    def take(self, expert: int, rows: int) -> None:
        """Ask for one more expert."""
        self.experts.append(expert)
        self._rows += rows

    def drop(self, expert: int, rows: int) -> None:
        """Ask for one expert less."""
        self.experts.remove(expert)
        self._rows -= rows


def _merge(shares: Mapping[PeerId, _Share], rows: Mapping[int, int], holders: Mapping[int, Sequence[PeerId]]) -> None:
    """Give up a peer, the least asked first, where the others take its experts and the layer takes no longer for it."""
    for peer in sorted(shares, key=lambda each: len(shares[each].experts)):
        asked = [each for each in shares if shares[each].experts and each != peer]
        if not shares[peer].experts or not asked:
            continue
        limit = max(shares[each].done_with(0, 0) for each in (*asked, peer)) + REQUEST_COST
        given: list[tuple[int, PeerId]] = []
        for expert in tuple(shares[peer].experts):
            takers = [each for each in asked if each in holders[expert]]
            best = min(takers, key=lambda each: shares[each].done_with(1, rows[expert]), default=None)
            if best is None or shares[best].done_with(1, rows[expert]) > limit:
                break
            shares[peer].drop(expert, rows[expert])
            shares[best].take(expert, rows[expert])
            given.append((expert, best))
        if shares[peer].experts:  # some of it has to be asked of this peer: then all of it
            for expert, taker in given:
                shares[taker].drop(expert, rows[expert])
                shares[peer].take(expert, rows[expert])
