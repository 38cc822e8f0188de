"""What a node takes to hold: the rarest first, never more than fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ExpertKey
from moehive.swarm.policy.placement import fill_budget

keys = st.builds(ExpertKey, st.integers(0, 4), st.integers(0, 7))
models = st.dictionaries(keys, st.integers(1, 100), max_size=40)
replica_counts = st.dictionaries(keys, st.integers(0, 5))


@given(models, replica_counts, st.integers(0, 3000), st.text(max_size=5))
def test_never_more_than_fits_and_nothing_that_would_still_fit_is_left(
    sizes: dict[ExpertKey, int], replicas: dict[ExpertKey, int], budget: int, seed: str
) -> None:
    chosen = fill_budget(sizes, replicas, budget=budget, seed=seed)
    used = sum(sizes[key] for key in chosen)
    assert chosen <= set(sizes)
    assert used <= budget
    assert all(used + sizes[key] > budget for key in set(sizes) - chosen)
    assert chosen == fill_budget(dict(reversed(sizes.items())), replicas, budget=budget, seed=seed)


@given(st.sets(keys, min_size=1), replica_counts, st.integers(0, 40), st.text(max_size=5))
def test_the_rarest_first(held: set[ExpertKey], replicas: dict[ExpertKey, int], budget: int, seed: str) -> None:
    sizes = dict.fromkeys(held, 1)
    chosen = fill_budget(sizes, replicas, budget=budget, seed=seed)
    most = max((replicas.get(key, 0) for key in chosen), default=0)
    assert all(replicas.get(key, 0) >= most for key in held - chosen)


def test_peers_that_start_together_choose_differently() -> None:
    sizes = {ExpertKey(0, expert): 1 for expert in range(64)}
    choices = [fill_budget(sizes, {}, budget=16, seed=seed) for seed in ("A", "B", "C", "D")]
    assert len(frozenset().union(*choices)) > 32
