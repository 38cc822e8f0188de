"""When to ask a second peer for what a first one was asked: after the time that nearly all of its answers keep.

A hedge costs the swarm work, so there is a budget: a share of all requests, which can be saved up for a bad moment but
not without bound. Source of the idea: Dean and Barroso, The Tail at Scale (CACM 2013), "hedged requests".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .speed import Speed, expected_seconds, lateness


@dataclass(frozen=True, slots=True)
class HedgeSettings:
    """How eagerly to hedge."""

    quantile: float = 0.95  # of a peer's answers that must be in before its share is asked elsewhere too
    at_least: float = 0.02  # seconds: below that a second request saves nothing
    unknown: float = 0.25  # seconds to give a peer of whom nothing is known
    share: float = 0.05  # hedges among all requests, in the long run
    burst: float = 8.0  # hedges that may be saved up


@dataclass(frozen=True, slots=True)
class HedgeBudget:
    """Hedges that may be spent now."""

    left: float = 4.0


def hedge_after(speed: Speed, settings: HedgeSettings, *, experts: int, rows: int, sent: int, in_flight: int) -> float:
    """Seconds after which an answer is late enough to ask somebody else too."""
    if not speed.answers:
        return settings.unknown
    expected = expected_seconds(speed, experts=experts, rows=rows, sent=sent, in_flight=in_flight)
    return max(settings.at_least, expected * lateness(speed, settings.quantile))


def after_request(budget: HedgeBudget, settings: HedgeSettings) -> HedgeBudget:
    """Every request earns a share of a hedge."""
    return replace(budget, left=min(budget.left + settings.share, settings.burst))


def spend(budget: HedgeBudget) -> HedgeBudget | None:
    """The budget after one hedge; None where it is not enough."""
    return replace(budget, left=budget.left - 1.0) if budget.left >= 1.0 else None
