"""Load statistics against their definitions, and counting from several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels.telemetry import LayerLoad, LoadStatistics, gini_coefficient, load_balance_coefficient


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_gini_is_the_mean_difference_over_twice_the_mean(counts: list[int]) -> None:
    size, total = len(counts), sum(counts)
    wanted = sum(abs(a - b) for a in counts for b in counts) / (2 * size * total) if total else 0.0
    assert gini_coefficient(torch.tensor(counts)) == pytest.approx(wanted)
    assert 0.0 <= gini_coefficient(torch.tensor(counts)) <= (size - 1) / size + 1e-12


def test_statistics_of_known_loads() -> None:
    even = LoadStatistics.of([5, 5, 5, 5], dropped=2)
    assert (even.utilisation, even.gini, even.load_balance, even.peak, even.dropped) == (1.0, 0.0, 1.0, 1.0, 2)
    one = LoadStatistics.of([8, 0, 0, 0])
    assert (one.utilisation, one.gini, one.peak) == (0.25, 0.75, 4.0)
    assert one.load_balance == pytest.approx(1 + 3**0.5)  # deviations 6, -2, -2, -2 of a mean of 2
    none = LoadStatistics.of([0, 0])
    assert (none.utilisation, none.gini, none.load_balance, none.peak) == (0.0, 0.0, 1.0, 1.0)


def test_the_coefficient_does_not_depend_on_the_unit() -> None:
    counts = torch.tensor([3, 1, 2])
    assert load_balance_coefficient(counts) == pytest.approx(load_balance_coefficient(counts / counts.sum()))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_choices_are_counted(tokens: int, top_k: int, seed: int) -> None:
    load = LayerLoad(6)
    wanted = [0] * 7
    for call in range(3):
        generator = torch.Generator().manual_seed(seed + call)
        experts = torch.randint(0, 7, (tokens, top_k), generator=generator)  # 6: left out
        load.count(experts)
        for expert in experts.flatten().tolist():
            wanted[expert] += 1
    load.on(torch.device("cpu")).add_(torch.tensor([1, 0, 0, 0, 0, 2]))  # what kernels counted
    found = load.statistics()
    assert (*found.counts, found.dropped) == (wanted[0] + 1, *wanted[1:5], wanted[5] + 2, wanted[6])


def test_no_count_is_lost_between_threads() -> None:
    load = LayerLoad(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [load.count(torch.tensor([[0, 1], [1, 1]])) for _ in range(500)])
    assert load.statistics().counts == (2000, 6000)
