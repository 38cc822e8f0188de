"""Activations before bytes: a simulated node whose requests suffer from bulk, and bounds for any facts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.priority import (
    BASELINE_LIFETIME,
    FLOOR,
    INTERVAL,
    MAX_SAMPLE_AGE,
    MIN_SAMPLES,
    PROBE_PAUSE,
    QUIET,
    SLOWDOWN,
    Baseline,
    Interval,
    Priority,
    Sample,
    decide,
    percentiles,
    slowdown,
)

MIB = float(1 << 20)
LINK = 1000 * MIB  # what bulk takes when nobody holds it back
IDLE = 0.010  # seconds of a request


@dataclass
class Node:
    """Answers a hundred requests per second; `suffers` says how much longer they take at a bulk rate."""

    suffers: Callable[[float], float]
    rows: int = 8
    wanted: float = 0.0  # bytes per second that peers would take
    priority: Priority = field(default_factory=Priority)
    now: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / INTERVAL)):
            allowed = self.priority.allowed
            sent = min(self.wanted, math.inf if allowed is None else allowed)
            for number in range(round(100 * INTERVAL)):
                took = IDLE * (1.0 + self.suffers(sent))
                self.samples.append(Sample(self.now + number / 100, self.rows, took))
            self.now += INTERVAL
            self.samples = self.samples[-1000:]
            self.priority = decide(self.priority, Interval(self.now, tuple(self.samples), sent))
            self.sent.append(sent)


def test_bulk_that_disturbs_nobody_runs_at_full_speed() -> None:
    node = Node(lambda sent: 0.5 * sent / LINK)
    node.run(10)
    node.wanted = LINK
    node.run(100)
    assert node.sent[-200:] == [LINK] * 200


def test_bulk_that_doubles_the_percentile_is_halved_until_it_does_not() -> None:
    """Requests take twice as long from 200 MiB/s on."""
    node = Node(lambda sent: 1.0 if sent >= 200 * MIB else 0.0)
    node.run(10)
    node.wanted = LINK
    node.run(5)
    assert min(node.sent[20:]) < 200 * MIB
    node.run(60)
    share_above = sum(sent >= 200 * MIB for sent in node.sent[-120:]) / 120
    assert share_above < 0.25
    assert sum(node.sent[-120:]) / 120 > 100 * MIB  # not strangled either


def test_a_limit_is_lifted_when_the_harm_is_over() -> None:
    node = Node(lambda sent: 4.0 * sent / LINK)
    node.run(10)
    node.wanted = LINK
    node.run(20)
    assert node.sent[-1] < LINK / 2
    node.suffers = lambda sent: 0.0
    node.run(40)
    assert node.sent[-1] == LINK
    assert node.priority.limit is None


def test_it_recovers_gradually() -> None:
    node = Node(lambda sent: 4.0 * sent / LINK)
    node.run(10)
    node.wanted = LINK
    node.run(5)
    node.suffers = lambda sent: 0.0
    node.run(20)
    limited = [sent for sent in node.sent if FLOOR < sent < LINK]
    assert all(later <= 1.11 * earlier for earlier, later in pairwise(limited))


def test_without_an_idle_time_bulk_pauses_for_a_moment_to_measure_it() -> None:
    node = Node(lambda sent: 4.0 * sent / LINK, wanted=LINK)
    node.run(10)
    assert FLOOR in node.sent
    assert node.sent.count(FLOOR) * INTERVAL <= 3.0
    assert node.sent[-1] < LINK / 2  # and the measurement was used


def test_the_idle_time_is_measured_again_now_and_then() -> None:
    node = Node(lambda sent: 0.0, wanted=LINK)
    node.run(3 * BASELINE_LIFETIME)
    probes = sum(now == FLOOR != before for before, now in pairwise(node.sent))
    assert 2 <= probes <= 4
    assert node.sent.count(LINK) > 0.95 * len(node.sent)


def test_longer_prompts_are_not_taken_for_a_slowdown() -> None:
    node = Node(lambda sent: 0.0)
    node.run(10)
    node.wanted, node.rows = LINK, 4096
    node.suffers = lambda sent: 50.0  # a prompt takes fifty times as long, bulk or not
    node.run(60)
    assert node.sent[-1] == LINK


def test_a_few_slow_requests_decide_nothing() -> None:
    samples = tuple(Sample(float(number) / 100, 8, 10.0) for number in range(MIN_SAMPLES - 1))
    priority = Priority(quiet=False, baselines={4: Baseline(IDLE, 0.0)})
    assert decide(priority, Interval(1.0, samples, LINK)).limit is None
    assert decide(priority, Interval(1.0, (*samples, samples[-1]), LINK)).limit == LINK / 2


def test_percentiles_by_size() -> None:
    small = [Sample(1.0, 1, seconds / 1000) for seconds in range(1, 101)]
    large = [Sample(1.0, 4, 1.0)] * MIN_SAMPLES
    rare = [Sample(1.0, 1000, 9.0)] * (MIN_SAMPLES - 1)
    assert percentiles([*small, *large, *rare], since=1.0) == {1: 0.099, 3: 1.0}
    assert percentiles(small, since=1.1) == {}


def test_the_size_that_suffers_most_counts() -> None:
    baselines = {1: Baseline(1.0, 0.0), 2: Baseline(1.0, 0.0)}
    assert slowdown(baselines, {1: 1.0, 2: 3.0, 3: 99.0}) == 3.0
    assert slowdown(baselines, {}) == 1.0


samples = st.builds(Sample, at=st.floats(0, 100), rows=st.integers(1, 9), seconds=st.floats(1e-6, 100))
many = st.lists(samples, max_size=3).flatmap(lambda few: st.integers(0, 40).map(lambda times: tuple(few * times)))
rates = st.floats(0, 1e11)
priorities = st.builds(
    Priority,
    limit=st.none() | st.floats(FLOOR, 1e11),
    lift=st.floats(FLOOR, 1e11),
    quiet=st.booleans(),
    since=st.floats(0, 100),
    probing=st.booleans(),
    probed=st.floats(0, 100),
    baselines=st.dictionaries(st.integers(0, 5), st.builds(Baseline, st.floats(1e-6, 100), st.floats(0, 100))),
)


@given(priorities, st.lists(st.tuples(many, rates), min_size=1, max_size=20))
def test_whatever_happens_the_limit_stays_in_bounds(
    priority: Priority, events: list[tuple[tuple[Sample, ...], float]]
) -> None:
    now = 100.0
    for recent, sent in events:
        now += INTERVAL
        before = priority
        priority = decide(priority, Interval(now, recent, sent))
        assert priority.allowed is None or priority.allowed >= FLOOR
        if before.limit is not None and priority.limit is not None:
            assert priority.limit <= before.limit * 1.1 + 1
        assert not (priority.probing and now - priority.probed > PROBE_PAUSE and priority.quiet and before.quiet)


def test_the_numbers_fit_each_other() -> None:
    assert FLOOR < QUIET  # at the floor, bulk is quiet: a probe measures something
    assert SLOWDOWN > 1.0
    assert MAX_SAMPLE_AGE > INTERVAL
