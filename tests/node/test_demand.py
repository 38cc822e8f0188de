"""What a node is asked for, as rates that fade."""

from __future__ import annotations

import pytest
from support.swarm_fakes import Clock

from moehive.node.demand import MEMORY, DemandMeter
from moehive.protocol.ids import ExpertKey
from moehive.protocol.messages import MAX_DEMAND

KEY, OTHER = ExpertKey(3, 5), ExpertKey(3, 6)


def test_a_steady_demand_is_told_as_its_rate_and_fades_when_it_ends() -> None:
    clock = Clock()
    meter = DemandMeter(clock=clock)
    for _ in range(6 * int(MEMORY)):
        meter.asked(3, (5,), (4,))
        clock.now += 1.0
    assert meter.rates()[KEY] == pytest.approx(4.0, rel=0.01)
    clock.now += MEMORY
    assert meter.rates()[KEY] == pytest.approx(4.0 / 2.718, rel=0.01)


def test_peers_are_told_the_most_first() -> None:
    meter = DemandMeter(clock=Clock())
    meter.asked(3, (5, 6), (1, 600))
    told = meter.message()
    assert (told.layers, told.experts) == ((3, 3), (6, 5))
    assert told.hourly == (3600, 6)
    assert told.rates() == {OTHER: 1.0, KEY: pytest.approx(1 / 600)}


def test_a_message_has_a_bound() -> None:
    meter = DemandMeter(clock=Clock())
    for layer in range(20):
        meter.asked(layer, range(100), [layer + 1] * 100)
    told = meter.message()
    assert len(told.experts) == MAX_DEMAND
    assert min(told.layers) == 9


def test_what_no_message_could_say_is_told_as_the_most_that_one_can() -> None:
    meter = DemandMeter(clock=Clock())
    meter.asked(3, (5,), (1 << 60,))
    assert meter.message().hourly == (1 << 40,)
