"""What a node takes to hold: the rarest first, never more than fits."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ExpertKey
from moehive.swarm.policy.placement import choose_experts, fill_budget, rarest_first

keys = st.builds(ExpertKey, st.integers(0, 4), st.integers(0, 7))
models = st.dictionaries(keys, st.tuples(st.integers(1, 100), st.integers(1, 50)), max_size=40)
replica_counts = st.dictionaries(keys, st.integers(0, 5))


@given(models, replica_counts, st.tuples(st.integers(0, 3000), st.integers(0, 1500)), st.text(max_size=5))
def test_never_more_than_fits_and_nothing_that_would_still_fit_is_left(
    costs: dict[ExpertKey, tuple[int, int]], replicas: dict[ExpertKey, int], budgets: tuple[int, int], seed: str
) -> None:
    chosen = fill_budget(costs, replicas, budgets=budgets, seed=seed)
    left = [budget - sum(costs[key][i] for key in chosen) for i, budget in enumerate(budgets)]
    assert chosen <= set(costs)
    assert min(left) >= 0
    assert all(costs[key][0] > left[0] or costs[key][1] > left[1] for key in set(costs) - chosen)
    assert chosen == fill_budget(dict(reversed(costs.items())), replicas, budgets=budgets, seed=seed)


@given(st.sets(keys, min_size=1), replica_counts, st.integers(0, 40), st.text(max_size=5))
def test_the_rarest_first(held: set[ExpertKey], replicas: dict[ExpertKey, int], budget: int, seed: str) -> None:
    chosen = fill_budget({key: [1] for key in held}, replicas, budgets=[budget], seed=seed)
    most = max((replicas.get(key, 0) for key in chosen), default=0)
    assert all(replicas.get(key, 0) >= most for key in held - chosen)


def test_peers_that_start_together_choose_differently() -> None:
    costs = {ExpertKey(0, expert): [1] for expert in range(64)}
    choices = [fill_budget(costs, {}, budgets=[16], seed=seed) for seed in ("A", "B", "C", "D")]
    assert len(frozenset().union(*choices)) > 32


def test_what_lies_on_the_disk_goes_before_what_is_as_rare() -> None:
    everything = [ExpertKey(layer, expert) for layer in range(4) for expert in range(8)]
    here, rarer = everything[5:16:3], everything[20:22]
    order = rarest_first(everything, dict.fromkeys(set(everything) - set(rarer), 1), seed="A", here=here)
    assert set(order[:2]) == set(rarer)
    assert set(order[2:6]) == set(here)


def test_a_layers_experts_lie_together_and_whose_layer_comes_first_differs() -> None:
    everything = [ExpertKey(layer, expert) for layer in range(6) for expert in range(8)]
    orders = [rarest_first(everything, {}, seed=seed) for seed in ("A", "B", "C", "D")]
    for order in orders:
        changes = sum(one.layer != other.layer for one, other in pairwise(order))
        assert changes == 5
    assert len({order[0].layer for order in orders}) > 1


@given(
    st.dictionaries(keys, st.integers(1, 50), max_size=40),
    replica_counts,
    st.tuples(st.integers(0, 3000), st.integers(0, 1500)),
    st.integers(1, 40),
    st.integers(0, 300),
)
def test_what_nobody_holds_is_taken_as_it_is_stored(
    sizes: dict[ExpertKey, int], replicas: dict[ExpertKey, int], budgets: tuple[int, int], stored: int, reserve: int
) -> None:
    widened = 2 * stored
    chosen = choose_experts(sizes, replicas, budgets=budgets, widened=widened, stored=stored, reserve=reserve, seed="A")
    fits = fill_budget({key: (widened, size) for key, size in sizes.items()}, replicas, budgets=budgets, seed="A")
    more = chosen - fits
    assert fits <= chosen <= set(sizes)
    assert not any(replicas.get(key) for key in more)
    assert sum(sizes[key] for key in chosen) <= budgets[1]
    if more:
        assert len(chosen) * stored + reserve <= budgets[0]
    without_disk = choose_experts(
        sizes, replicas, budgets=budgets[:1], widened=widened, stored=stored, reserve=reserve, seed="A"
    )
    assert len(without_disk) >= min(len(sizes), budgets[0] // widened)
