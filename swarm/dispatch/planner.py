"""Which peer computes which experts of one layer: a decision on facts, without I/O.

A layer costs one round trip, however many experts it needs, if few peers are asked at once; so the plan covers the
experts with few peers first, and among equals takes the one expected to answer soonest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moehive.protocol.ids import PeerId

UNKNOWN_LATENCY = 0.05  # seconds assumed of a peer that never answered yet: try it, but not before a known good one


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What we know of a peer's speed."""

    latency: float = UNKNOWN_LATENCY  # seconds of a typical answer
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
) -> LayerPlan:
    """Cover the experts in `rows` (expert -> number of rows) by this machine and by `holders`.

    Greedy set cover by number of experts, then by expected answer time, then by peer id, so that equal facts give an
    equal plan.
    """
    open_experts = {expert for expert in rows if expert not in local}
    missing = {expert for expert in open_experts if not holders.get(expert)}
    open_experts -= missing
    covers = _covers(open_experts, holders)
    remote: dict[PeerId, tuple[int, ...]] = {}
    while open_experts:
        best = max(covers, key=lambda peer: (len(covers[peer] & open_experts), -_expected(peer, facts), peer))
        remote[best] = tuple(sorted(covers[best] & open_experts))
        open_experts -= covers.pop(best)
    return LayerPlan(
        local=tuple(sorted(expert for expert in rows if expert in local)),
        remote=dict(sorted(remote.items())),
        missing=tuple(sorted(missing)),
    )


def _covers(experts: Collection[int], holders: Mapping[int, Sequence[PeerId]]) -> dict[PeerId, set[int]]:
    covers: dict[PeerId, set[int]] = {}
    for expert in experts:
        for peer in holders[expert]:
            covers.setdefault(peer, set()).add(expert)
    return covers


def _expected(peer: PeerId, facts: Mapping[PeerId, PeerFacts]) -> float:
    known = facts.get(peer, PeerFacts())
    return known.latency * (1 + known.in_flight)
