"""Metric families of Prometheus, from numbers that are counted elsewhere, and their text."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Final

from prometheus_client import Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from moehive.swarm.telemetry.histogram import Histogram

Labelled = Sequence[tuple[Sequence[str], float]]  # the values of the labels, and the number

# Ends of buckets, as doublings of a microsecond: those of our histograms are finer, and exact at each of these.
LOADS: Final = range(6, 26, 2)  # 64 us to 17 s: there is one of these for each tier and layer
REQUESTS: Final = range(6, 25)  # 64 us to 17 s


def counters(name: str, text: str, labels: Sequence[str], values: Labelled) -> CounterMetricFamily:
    """What only grows; the name is shown with _total behind it."""
    family = CounterMetricFamily(name, text, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def gauges(name: str, text: str, labels: Sequence[str], values: Labelled) -> GaugeMetricFamily:
    """What goes up and down."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def histograms(
    name: str,
    text: str,
    labels: Sequence[str],
    values: Sequence[tuple[Sequence[str], Histogram]],
    doublings: Sequence[int],
) -> HistogramMetricFamily:
    """Seconds, in buckets that end at 1 us * 2**doubling, and one for the rest."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for of, histogram in values:
        ends = [
            (str(1e-6 * 2.0**doubling), count)
            for doubling, count in zip(doublings, histogram.below(doublings), strict=True)
        ]
        family.add_metric(of, [*ends, ("+Inf", histogram.count)], histogram.total)
    return family


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    """One without labels."""
    return counters(name, text, [], [([], value)])


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    """One without labels."""
    return gauges(name, text, [], [([], value)])


def info(name: str, text: str, **labels: str) -> GaugeMetricFamily:
    """What does not change: always 1, with labels that say it. The name ends in _info by custom."""
    return gauges(name, text, list(labels), [(list(labels.values()), 1)])


def process_metrics() -> Iterator[Metric]:
    """Of any process of moehive: the build, and what the system says of the process (process_...)."""
    yield info("moehive_build_info", "What runs here.", version=version("moehive"), python=platform.python_version())
    yield from ProcessCollector(registry=None).collect()


def exposition(metrics: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """The text and its media type: OpenMetrics for whoever accepts that, as Prometheus does, else the older form.

    It takes tens of milliseconds for thousands of series, so it belongs into a thread.
    """
    encode, media_type = choose_encoder(accept)
    return encode(_Collected(metrics)), media_type


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
