"""Hedges are late, bounded, and saved up only so far."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.policy.hedging import HedgeBudget, HedgeSettings, after_request, hedge_after, spend, stuck_after
from moehive.swarm.policy.speed import Speed

SETTINGS = HedgeSettings()
FEW = {"experts": 8, "rows": 8, "sent": 8192, "in_flight": 0}


@given(st.lists(st.booleans(), max_size=400))
def test_hedges_are_a_share_of_the_requests(wants: list[bool]) -> None:
    budget, hedges = HedgeBudget(), 0
    for want in wants:
        budget = after_request(budget, SETTINGS)
        left = spend(budget) if want else None
        if left is not None:
            budget, hedges = left, hedges + 1
    assert hedges <= HedgeBudget().left + SETTINGS.share * len(wants)
    assert 0 <= budget.left <= SETTINGS.burst


def test_a_peer_is_given_the_time_that_its_answers_keep() -> None:
    steady = Speed(answers=64, network=0.1, late=(1.0,) * 64)
    assert hedge_after(steady, SETTINGS, **FEW) == 0.1
    unsteady = Speed(answers=64, network=0.1, late=(1.0,) * 54 + (3.0,) * 10)
    assert abs(hedge_after(unsteady, SETTINGS, **FEW) - 0.3) < 1e-9
    assert hedge_after(Speed(answers=64, network=0.001, late=(1.0,) * 64), SETTINGS, **FEW) == SETTINGS.at_least
    assert hedge_after(Speed(), SETTINGS, **FEW) == SETTINGS.unknown


def test_who_is_much_too_late_is_stuck() -> None:
    assert stuck_after(0.02, SETTINGS) == SETTINGS.stuck_at_least
    assert stuck_after(5.0, SETTINGS) == 20.0


def test_no_more_hedges_are_saved_up_than_a_burst() -> None:
    budget = HedgeBudget()
    for _ in range(1000):
        budget = after_request(budget, SETTINGS)
    assert budget.left == SETTINGS.burst
