"""Activations before bytes: how fast bulk may leave while the node also answers requests of people who wait for tokens.

The measure is the time that expert requests take, compared with the same when hardly any bulk is sent. When its 99th
percentile doubles, the bulk rate is halved; then it recovers gradually. Requests are compared with others of about as
many rows, so that a prompt after single tokens does not count as a slowdown.

The idle time is not known where bulk never pauses. Then bulk is held down for a moment to measure it, as BBR does for
the round trip of a link (Cardwell et al., 2016).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

INTERVAL = 0.5  # seconds between decisions
MIN_SAMPLES = 100  # of one size, for a percentile that means something
MAX_SAMPLE_AGE = 10.0  # seconds
SLOWDOWN = 2.0  # of the 99th percentile, at which bulk is halved
FLOOR = 4.0 * (1 << 20)  # bytes per second that bulk always gets
QUIET = FLOOR * 1.5  # bytes per second below which bulk disturbs nobody
GROWTH = 1.1  # per interval: doubled after 3.6 s
SMOOTHING = 0.25
BASELINE_LIFETIME = 120.0  # seconds after which the idle time is measured again
PROBE_PAUSE = 60.0  # seconds between two such measurements
PROBE_TIMEOUT = 2.0  # seconds one may take; where requests are rare it brings nothing


@dataclass(frozen=True, slots=True)
class Sample:
    """One expert request that was answered."""

    at: float  # seconds of the caller's clock
    rows: int  # (token, expert) pairs
    seconds: float  # from its arrival to its answer

    @property
    def size(self) -> int:
        """Requests with equal sizes have about as many rows: a power of two."""
        return self.rows.bit_length()


@dataclass(frozen=True, slots=True)
class Baseline:
    """The 99th percentile at idle, as last measured."""

    p99: float  # seconds
    at: float


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened since the last decision."""

    now: float
    samples: tuple[Sample, ...]  # recent ones, of earlier intervals too
    sent: float  # bulk bytes per second


@dataclass(frozen=True, slots=True)
class Priority:
    """What has been decided."""

    limit: float | None = None  # bytes per second; None: as fast as it goes
    lift: float = 0.0  # the limit at which it is lifted
    quiet: bool = True  # hardly any bulk was sent in the last interval
    since: float = -math.inf  # samples before this belong to another state of affairs
    probing: bool = False
    probed: float = -math.inf
    baselines: Mapping[int, Baseline] = field(default_factory=dict)  # by size

    @property
    def allowed(self) -> float | None:
        """Bytes per second that bulk may send now; None: as fast as it goes."""
        return FLOOR if self.probing else self.limit


def decide(priority: Priority, facts: Interval) -> Priority:
    """The decision for the next interval."""
    quiet = facts.sent < QUIET
    if quiet is not priority.quiet:
        return replace(priority, quiet=quiet, since=facts.now)
    found = percentiles(facts.samples, since=max(priority.since, facts.now - MAX_SAMPLE_AGE))
    if quiet:
        probing = priority.probing and not found and facts.now - priority.probed < PROBE_TIMEOUT
        return _recover(replace(priority, baselines=_learn(priority.baselines, found, facts.now), probing=probing))
    if priority.probing:  # what had been begun before is still leaving
        return priority
    if slowdown(priority.baselines, found) >= SLOWDOWN:
        return _halve(priority, facts)
    if _unknown(priority.baselines, found, facts.now) and facts.now - priority.probed >= PROBE_PAUSE:
        return replace(priority, probing=True, probed=facts.now)
    return _recover(priority)


def percentiles(samples: Iterable[Sample], *, since: float) -> Mapping[int, float]:
    """The 99th percentile in seconds, by size, of those sizes that were asked for often enough."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.at >= since:
            by_size[sample.size].append(sample.seconds)
    return {
        size: sorted(times)[math.ceil(0.99 * len(times)) - 1]
        for size, times in by_size.items()
        if len(times) >= MIN_SAMPLES
    }


def slowdown(baselines: Mapping[int, Baseline], found: Mapping[int, float]) -> float:
    """How many times longer requests take than at idle, of the size that suffers most; 1 where that is not known."""
    return max((p99 / baselines[size].p99 for size, p99 in found.items() if size in baselines), default=1.0)


def _learn(baselines: Mapping[int, Baseline], found: Mapping[int, float], now: float) -> Mapping[int, Baseline]:
    learnt = dict(baselines)
    for size, p99 in found.items():
        old = baselines[size].p99 if size in baselines else p99
        learnt[size] = Baseline(old + SMOOTHING * (p99 - old), now)
    return learnt


def _unknown(baselines: Mapping[int, Baseline], found: Mapping[int, float], now: float) -> bool:
    return any(size not in baselines or now - baselines[size].at > BASELINE_LIFETIME for size in found)


def _halve(priority: Priority, facts: Interval) -> Priority:
    used = facts.sent if priority.limit is None else min(priority.limit, facts.sent)
    lift = max(2 * facts.sent, FLOOR) if priority.limit is None else priority.lift
    return replace(priority, limit=max(used / 2, FLOOR), since=facts.now, lift=lift)


def _recover(priority: Priority) -> Priority:
    if priority.limit is None:
        return priority
    limit = priority.limit * GROWTH
    return replace(priority, limit=None if limit >= priority.lift else limit)
