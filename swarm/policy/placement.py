"""Which experts a peer should hold: a decision on facts, without I/O."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence

from moehive.protocol.ids import ExpertKey


def choose_experts(
    sizes: Mapping[ExpertKey, int],
    replicas: Mapping[ExpertKey, int],
    *,
    budgets: Sequence[int],
    widened: int,
    stored: int,
    reserve: int,
    seed: str,
    here: Collection[ExpertKey] = (),
) -> frozenset[ExpertKey]:
    """Experts to hold within `budgets` (bytes of memory and, where that is bounded, of disk), of those in `sizes`.

    First what fits in the form that is computed with, `widened` bytes each. Then what nobody else holds, as long as
    all fits as it is stored, `stored` bytes each, beside `reserve` bytes of the other form: slower, but the swarm can
    run the model. `sizes` are those on disk; `replicas`, `seed` and `here` as in `fill_budget`.
    """
    count = len(budgets)
    costs = {key: (widened, size)[:count] for key, size in sizes.items()}
    chosen = fill_budget(costs, replicas, budgets=budgets, seed=seed, here=here)
    taken = (reserve + len(chosen) * stored, sum(sizes[key] for key in chosen))
    left = [max(0, budget - used) for budget, used in zip(budgets, taken, strict=False)]
    lacking = {
        key: (stored, size)[:count] for key, size in sizes.items() if key not in chosen and not replicas.get(key)
    }
    return chosen | fill_budget(lacking, replicas, budgets=left, seed=seed, here=here)


def fill_budget(
    costs: Mapping[ExpertKey, Sequence[int]],
    replicas: Mapping[ExpertKey, int],
    *,
    budgets: Sequence[int],
    seed: str,
    here: Collection[ExpertKey] = (),
) -> frozenset[ExpertKey]:
    """Experts to hold: those that the fewest peers hold first, as many as fit into every one of `budgets`.

    `costs` are what each expert takes of each budget (bytes of memory, bytes of disk); `replicas` says how many peers
    hold each (absent: none). Peers that start at the same moment see the same facts, so ties are broken at random with
    a `seed` of the peer's own; `here` as in `rarest_first`.
    """
    chosen, left = set(), tuple(budgets)
    for key in rarest_first(costs, replicas, seed=seed, here=here):
        after = tuple(budget - cost for budget, cost in zip(left, costs[key], strict=True))
        if min(after) >= 0:
            chosen.add(key)
            left = after
    return frozenset(chosen)


def rarest_first(
    keys: Iterable[ExpertKey], replicas: Mapping[ExpertKey, int], *, seed: str, here: Collection[ExpertKey] = ()
) -> list[ExpertKey]:
    """Experts that the fewest peers hold first; of those as rare, what is on disk `here` already, then layer by layer.

    A layer's experts lie together: its peers are all asked, and waited for, in each of its calls. The order of the
    layers is the peer's own, so that peers that load at the same time soon hold different ones, and get the rest from
    each other.
    """
    order = sorted(keys)
    shuffled = random.Random(seed)
    shuffled.shuffle(order)
    layers = sorted({key.layer for key in order})
    shuffled.shuffle(layers)
    place = {layer: position for position, layer in enumerate(layers)}
    order.sort(key=lambda key: (replicas.get(key, 0), key not in here, place[key.layer]))  # stable: a shuffle decides
    return order
