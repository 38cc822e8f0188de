"""Quantiles from buckets, against the sorted samples."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.telemetry.histogram import Histogram, Latencies, merged

SECONDS = st.floats(1e-6, 1000.0)


def filled(samples: list[float]) -> Histogram:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    return histogram


@given(st.lists(SECONDS, min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_is_an_upper_bound_and_at_most_a_quarter_off(samples: list[float], share: float) -> None:
    histogram = filled(samples)
    exact = sorted(samples)[max(0, math.ceil(share * len(samples) - 1e-9) - 1)]
    assert exact * (1 - 1e-9) <= histogram.quantile(share) <= exact * 1.25 * (1 + 1e-9)


@given(st.lists(st.floats(0.0, 1e9), max_size=50))
def test_nothing_is_lost_however_short_or_long(samples: list[float]) -> None:
    found = filled(samples).latencies
    assert found.count == len(samples)
    assert found.slowest == max(samples, default=0.0)
    assert found.p50 <= found.p99 <= found.slowest
    assert found.total == pytest.approx(sum(samples))


@given(st.lists(SECONDS, max_size=50), st.lists(SECONDS, max_size=50))
def test_merging_is_counting_everything_in_one(some: list[float], others: list[float]) -> None:
    both, one = merged([filled(some), filled(others)]), filled(some + others)
    assert (both._counts, both.count, both.slowest) == (one._counts, one.count, one.slowest)
    assert both.total == pytest.approx(one.total)


@given(st.lists(SECONDS.filter(lambda seconds: abs(math.log2(seconds * 1e6) % 1 - 0.5) < 0.499), max_size=50))
def test_what_was_shorter_than_a_doubling_is_counted_exactly(samples: list[float]) -> None:
    doublings = range(31)
    assert filled(samples).below(doublings) == [sum(one < 1e-6 * 2**each for one in samples) for each in doublings]


def test_a_copy_stays_as_it_was() -> None:
    histogram = filled([0.1])
    copy = histogram.copy()
    histogram.add(0.2)
    assert (copy.count, copy.slowest, histogram.count) == (1, 0.1, 2)


def test_an_empty_one_says_nothing() -> None:
    assert Histogram().latencies == Latencies() == merged([]).latencies
    assert Latencies().mean == 0.0


def test_it_does_not_grow() -> None:
    histogram = Histogram()
    buckets = histogram._counts
    for power in range(-9, 9):
        histogram.add(10.0**power)
    assert histogram._counts is buckets
    assert len(buckets) == 121
