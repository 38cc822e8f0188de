"""Fetching against sending, replayed on the recorded routing of the demo model, against the best that hindsight finds.

One cost for all: seconds waited in calls that miss an expert, and seconds of the link for experts that are fetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from support.recorded_routing import DEMO, Call, recorded_layers

from moehive.swarm.policy.fetch_or_send import LayerFacts, experts_to_fetch

WAIT = 0.010  # seconds that a call waits for the network
EXPERTS = 8
PRICES = [0.3, 2, 10, 50, 200]  # calls' waits that one expert costs
LAYERS = recorded_layers(DEMO)


def replay(calls: Sequence[Call], price: float, *, horizon: int | None) -> float:
    """What the policy costs, asked after every call; `horizon` in calls, None where the caller does not know."""
    resident: set[int] = set()
    uses: Counter[int] = Counter()
    tokens, cost, paid = 0, 0.0, 0.0
    for done in range(len(calls) + 1):
        left = None if horizon is None else float(horizon - done)
        facts = LayerFacts(uses, tokens, EXPERTS, resident, WAIT, price, left, paid)
        if fetched := experts_to_fetch(facts):
            resident |= set(fetched)
            cost, paid = cost + price * len(fetched), 0.0
        if done < len(calls):
            wait = 0.0 if needed(calls[done]) <= resident else WAIT
            cost, paid, tokens = cost + wait, paid + wait, tokens + len(calls[done])
            for experts in calls[done]:
                uses.update(experts)
    return cost


def needed(call: Call) -> frozenset[int]:
    return frozenset().union(*call)


def oracle(calls: Sequence[Call], price: float) -> float:
    """The best set of experts, of all sets, fetched before the first call."""
    sets = Counter(needed(call) for call in calls)
    return min(
        price * len(chosen) + WAIT * sum(times for experts, times in sets.items() if not experts <= chosen)
        for chosen in all_sets()
    )


def all_sets() -> Iterator[frozenset[int]]:
    for count in range(EXPERTS + 1):
        yield from map(frozenset, combinations(range(EXPERTS), count))


def better_simple_way(calls: Sequence[Call], price: float) -> float:
    """Send for ever, or fetch all that is used."""
    return min(WAIT * len(calls), price * len(frozenset().union(*map(needed, calls))))


def traces() -> Iterator[list[Call]]:
    """Every layer, all sessions after each other; and every session of every layer alone."""
    for layer in LAYERS:
        yield layer.calls
        yield from (layer.session(number) for number in range(len(layer.sessions)))


@pytest.mark.parametrize("price", PRICES)
def test_who_knows_how_much_will_be_generated_pays_about_what_an_oracle_pays(price: float) -> None:
    for calls in traces():
        cost = replay(calls, price * WAIT, horizon=len(calls))
        assert cost <= 1.15 * oracle(calls, price * WAIT)
        assert cost <= 1.05 * better_simple_way(calls, price * WAIT)


@pytest.mark.parametrize("price", PRICES)
def test_who_does_not_know_pays_at_most_twice_as_much(price: float) -> None:
    for calls in traces():
        cost = replay(calls, price * WAIT, horizon=None)
        assert cost <= 2.0 * oracle(calls, price * WAIT) + (1 + price) * WAIT
