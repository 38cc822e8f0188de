"""Load statistics against their definitions, and counting from several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels.telemetry import LoadStatistics, RoutingTelemetry, gini_coefficient, load_balance_coefficient


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


def test_layers_are_counted_apart_and_together() -> None:
    telemetry = RoutingTelemetry(3)
    assert telemetry.total().counts == (0, 0, 0)
    telemetry.count(4, [(0, 2), (3, 1)])  # expert 3 of 3: left out
    telemetry.count(1, [(2, 5)])
    telemetry.count(4, [(0, 1), (1, 1)])
    layers = telemetry.layers()
    assert list(layers) == [1, 4]
    assert (layers[1].counts, layers[1].dropped) == ((0, 0, 5), 0)
    assert (layers[4].counts, layers[4].dropped) == ((3, 1, 0), 1)
    assert (telemetry.total().counts, telemetry.total().dropped) == ((3, 1, 5), 1)


def test_no_count_is_lost_between_threads() -> None:
    telemetry = RoutingTelemetry(2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [telemetry.count(0, [(0, 1), (1, 2)]) for _ in range(2000)])
    assert telemetry.layers()[0].counts == (8000, 16000)
