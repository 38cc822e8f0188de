"""Fetching in the background against sending for ever, replayed: close to an oracle, never far from either."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routing_traces import Trace, popular, recent

from moehive.swarm.policy.fetch_or_send import LayerFacts, experts_to_fetch

WAIT = 0.010  # seconds that a token waits for the network
TRACES = {
    "Qwen3-30B-like": (128, recent(128, 8, 500, locality=1.3, seed=1)),
    "DeepSeek-V2-Lite-like": (64, recent(64, 6, 500, locality=0.9, seed=2)),
    "Phi-like": (16, recent(16, 2, 500, locality=1.0, seed=3)),
    "Mixtral-like": (8, recent(8, 2, 500, locality=0.3, seed=4)),
    "skewed": (128, popular(128, 8, 500, skew=1.0, seed=5)),
    "uniform": (64, popular(64, 4, 500, skew=0.0, seed=7)),
    "short": (16, recent(16, 2, 60, locality=1.0, seed=8)),
}
PRICES = [0.3, 1, 2, 5, 10, 20, 50, 100, 500]  # tokens' waits that one expert costs


def policy(trace: Trace, experts: int, price: float, *, horizon: int | None, room: int = 1 << 30) -> float:
    """Seconds waited and fetched by the policy; `horizon` as the caller knows it, None where it does not."""
    resident: set[int] = set()
    uses: Counter[int] = Counter()
    cost = paid = 0.0
    for done in range(-1, len(trace)):
        if done >= 0:
            wait = 0.0 if trace[done] <= resident else WAIT
            cost, paid = cost + wait, paid + wait
            uses.update(trace[done])
        left = None if horizon is None else float(horizon - done - 1)
        facts = LayerFacts(uses, done + 1, experts, resident, WAIT, price, left, paid, room - len(resident))
        if fetched := experts_to_fetch(facts):
            assert not resident & set(fetched)
            resident |= set(fetched)
            cost, paid = cost + price * len(fetched), 0.0
    assert len(resident) <= room
    return cost


def always_send(trace: Trace) -> float:
    return WAIT * len(trace)


def always_fetch(trace: Trace, price: float) -> float:
    return price * len(frozenset().union(*trace))


def oracle(trace: Trace, price: float, room: int = 1 << 30) -> float:
    """The best number of the most used experts, by their uses in the future, fetched before the first token."""
    ranked = [expert for expert, _ in Counter(expert for token in trace for expert in token).most_common()]
    place = {expert: index for index, expert in enumerate(ranked)}
    needed = Counter(max(place[expert] for expert in token) + 1 for token in trace)
    best, covered = always_send(trace), 0
    for count in range(1, min(len(ranked), room) + 1):
        covered += needed[count]
        best = min(best, price * count + WAIT * (len(trace) - covered))
    return best


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("name", TRACES)
def test_close_to_an_oracle_and_to_the_better_of_both_simple_ways(name: str, price: float) -> None:
    experts, trace = TRACES[name]
    cost = policy(trace, experts, price * WAIT, horizon=len(trace))
    assert cost <= 1.15 * oracle(trace, price * WAIT)
    better = min(always_send(trace), always_fetch(trace, price * WAIT))
    assert cost <= 1.05 * better + WAIT


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize("name", TRACES)
def test_without_knowing_how_many_tokens_come_at_most_twice_the_oracles_cost(name: str, price: float) -> None:
    experts, trace = TRACES[name]
    cost = policy(trace, experts, price * WAIT, horizon=None)
    assert cost <= 2.0 * oracle(trace, price * WAIT) + (1 + price) * WAIT


@pytest.mark.parametrize("price", PRICES)
def test_where_few_experts_are_used_nearly_always_the_price_of_finding_out_is_bounded(price: float) -> None:
    """No balanced model routes like this: a tenth of the experts takes nine tenths of the rows, for ever."""
    trace = popular(64, 4, 500, skew=2.0, seed=6)
    assert policy(trace, 64, price * WAIT, horizon=len(trace)) <= 1.75 * oracle(trace, price * WAIT)


@pytest.mark.parametrize("room", [8, 16, 32])
@pytest.mark.parametrize("price", [1, 5, 20])
@pytest.mark.parametrize("name", ["skewed", "Qwen3-30B-like"])
def test_with_room_for_some_experts_only(name: str, price: float, room: int) -> None:
    experts, trace = TRACES[name]
    cost = policy(trace, experts, price * WAIT, horizon=len(trace), room=room)
    assert cost <= 1.15 * oracle(trace, price * WAIT, room)


@given(
    uses=st.dictionaries(st.integers(0, 15), st.floats(0, 50)),
    resident=st.frozensets(st.integers(0, 15)),
    wait=st.floats(0, 1),
    price=st.floats(1e-3, 10),
    horizon=st.none() | st.floats(0, 1e4),
    paid=st.floats(0, 10),
    room=st.integers(0, 16),
)
def test_only_what_is_missing_and_fits_is_fetched(
    uses: dict[int, float],
    resident: frozenset[int],
    wait: float,
    price: float,
    horizon: float | None,
    paid: float,
    room: int,
) -> None:
    fetched = experts_to_fetch(LayerFacts(uses, 50, 16, resident, wait, price, horizon, paid, room))
    assert len(fetched) == len(set(fetched)) <= room
    assert not set(fetched) & resident
    assert set(fetched) <= set(range(16))
    if horizon is not None and wait * horizon < price:
        assert not fetched  # it could never pay
