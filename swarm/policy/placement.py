"""Which experts a peer should hold: a decision on facts, without I/O."""

from __future__ import annotations

import random
from collections.abc import Mapping

from moehive.protocol.ids import ExpertKey


def fill_budget(
    sizes: Mapping[ExpertKey, int], replicas: Mapping[ExpertKey, int], *, budget: int, seed: str
) -> frozenset[ExpertKey]:
    """Experts to hold: those that the fewest peers hold first, as many as fit into `budget` bytes.

    `sizes` are the model's experts in bytes; `replicas` says how many peers hold each (absent: none). Peers that start
    at the same moment see the same facts, so ties are broken at random with a `seed` of the peer's own.
    """
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda key: replicas.get(key, 0))  # stable: the shuffle decides among equals
    chosen, used = set(), 0
    for key in order:
        if used + sizes[key] <= budget:
            chosen.add(key)
            used += sizes[key]
    return frozenset(chosen)
