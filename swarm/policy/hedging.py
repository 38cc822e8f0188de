"""When to ask a second peer for what a first one was asked: after the time that nearly all of its answers keep.

A hedge costs the swarm work, so there is a budget: a share of all requests, which can be saved up for a bad moment but
not without bound. Only a peer that seems stuck is not waited for, budget or not. Source of the idea: Dean and Barroso,
The Tail at Scale (CACM 2013), "hedged requests".
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
    stuck: float = 4.0  # times as late as that, and
    stuck_at_least: float = 1.0  # seconds late: then the budget does not count


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


def stuck_after(late: float, settings: HedgeSettings) -> float:
    """Seconds after which a request is asked elsewhere though the budget is spent; `late` is what `hedge_after` said.

    What the budget is for is a busy swarm, in which many answers are a little late. One that is so late does not come,
    and who waits for it sends nothing by which the budget would grow.
    """
    return max(settings.stuck_at_least, settings.stuck * late)


def after_request(budget: HedgeBudget, settings: HedgeSettings) -> HedgeBudget:
    """Every request earns a share of a hedge."""
    return replace(budget, left=min(budget.left + settings.share, settings.burst))


def spend(budget: HedgeBudget) -> HedgeBudget | None:
    """The budget after one hedge; None where it is not enough."""
    return replace(budget, left=budget.left - 1.0) if budget.left >= 1.0 else None
