import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.prefetch.plan import (
    EDGES,
    GRADES,
    NEVER,
    NOTHING,
    Bounds,
    Economy,
    Profile,
    choose,
    grade,
    least_chance,
    make_plan,
)
from moehive.swarm.prefetch.predictors import Point

FAST = Economy(load=0.5, lead=1.0, displaced=0.0)
BOUNDS = Bounds(width=4)
SURE, POOR = GRADES - 1, GRADES - 3


def profile(right: float, number: int = SURE, guesses: int = 400) -> Profile:
    """One absent expert per guess, of which `right` are used."""
    found = Profile()
    for index in range(guesses):
        found.learn([number], [math.floor((index + 1) * right) > math.floor(index * right)])
    return found


def test_grades_rise_with_the_margin() -> None:
    assert grade(-9.0) == 0
    assert grade(EDGES[0]) == 1
    assert grade(9.0) == GRADES - 1


def test_a_profile_learns_what_its_grades_are_worth() -> None:
    assert profile(0.5).chance(SURE) == pytest.approx(0.5, abs=0.03)
    assert profile(0.5).per_guess(SURE) == pytest.approx(1.0)
    assert Profile().chance(SURE) > Profile().chance(0)


def test_old_guesses_are_forgotten() -> None:
    found = profile(1.0)
    for _ in range(3000):
        found.learn([SURE], [False])
    assert found.chance(SURE) < 0.1


def test_a_sure_guess_in_time_saves_the_whole_load() -> None:
    assert FAST.gain(1.0) == FAST.load
    assert Economy(load=4.0, lead=1.0, displaced=0.0).gain(1.0) == 1.0


def test_a_wrong_guess_costs_what_is_left_of_it_when_the_layer_begins() -> None:
    assert Economy(load=4.0, lead=1.0, contention=0.0, displaced=0.0).gain(0.0) == -3.0


def test_what_a_load_displaces_counts_however_right_the_guess_is() -> None:
    assert Economy(load=4.0, lead=1.0, displaced=0.1).gain(1.0) == pytest.approx(0.6)
    assert Economy(load=40.0, lead=1.0).gain(1.0) < 0


def test_a_load_behind_others_has_less_time() -> None:
    assert FAST.gain(1.0, position=1) == FAST.load
    assert FAST.gain(1.0, position=1.5) == pytest.approx(0.25)
    assert FAST.gain(1.0, position=2) == 0.0


def test_what_pays_is_loaded() -> None:
    least, gain = least_chance(profile(0.9), FAST, BOUNDS)
    assert least <= profile(0.9).chance(SURE)
    assert gain > 0.3


def test_a_link_too_slow_to_profit_loads_nothing() -> None:
    assert least_chance(profile(0.9), Economy(load=20.0, lead=1.0), BOUNDS) == (NEVER, 0.0)


def test_a_quick_link_loads_nothing_that_would_waste_too_much() -> None:
    quick = Economy(load=0.001, lead=1.0)
    assert least_chance(profile(0.7), quick, Bounds(width=4, wasted=0.2))[0] == NEVER
    assert least_chance(profile(0.7), quick, Bounds(width=4, wasted=0.4))[0] < 1


def test_depth_follows_the_lead_that_loads_need() -> None:
    profiles = {Point.ENTRY: profile(0.95), Point.BEFORE: profile(0.85)}
    short = {Point.ENTRY: Economy(0.1, 0.2), Point.BEFORE: Economy(0.1, 1.0)}
    assert make_plan(profiles, short, BOUNDS).depth == Point.ENTRY.ahead
    long = {Point.ENTRY: Economy(0.8, 0.2), Point.BEFORE: Economy(0.8, 1.0)}
    plan = make_plan(profiles, long, BOUNDS)
    assert plan.depth == Point.BEFORE.ahead
    assert plan.least[Point.EARLIER] == NEVER


def test_depth_does_not_change_for_a_trifle() -> None:
    profiles = {Point.ENTRY: profile(0.9), Point.BEFORE: profile(0.9)}
    first = make_plan(profiles, {Point.ENTRY: Economy(1.0, 0.5), Point.BEFORE: Economy(1.0, 0.8)}, BOUNDS)
    assert first.depth == 1
    nearly = {Point.ENTRY: Economy(1.0, 0.81), Point.BEFORE: Economy(1.0, 0.8)}
    assert make_plan(profiles, nearly, BOUNDS, first).depth == 1
    clearly = {Point.ENTRY: Economy(1.0, 0.99), Point.BEFORE: Economy(1.0, 0.6)}
    assert make_plan(profiles, clearly, BOUNDS, first).depth == 0


def test_nothing_known_is_nothing_planned() -> None:
    assert make_plan({}, {}, BOUNDS) == NOTHING
    assert make_plan({Point.ENTRY: Profile()}, {Point.ENTRY: FAST}, BOUNDS) == NOTHING
    assert NOTHING.depth == -1


def test_width_ends_where_the_link_is_full() -> None:
    assert choose([0.99] * 6, 0.5, Economy(load=0.5, lead=1.0), 6) == 2
    assert choose([0.99] * 6, 0.5, Economy(load=0.1, lead=1.0), 6) == 6
    assert choose([0.99, 0.4], 0.5, Economy(load=0.1, lead=1.0), 6) == 1


chances = st.floats(0, 1)
seconds = st.floats(1e-6, 1e3)


@given(st.lists(chances, max_size=GRADES), seconds, seconds)
def test_planned_waste_stays_within_the_bound(rates: list[float], load: float, lead: float) -> None:
    found = Profile(guesses=100.0)
    for number, rate in enumerate(rates):
        found.seen[number], found.used[number] = 100.0, 100.0 * rate
    least, gain = least_chance(found, Economy(load, lead), BOUNDS)
    taken = [n for n in range(GRADES) if found.chance(n) >= least and found.seen[n]]
    waste = [1 - found.chance(n) for n in sorted(taken, key=found.chance, reverse=True)][: BOUNDS.width]
    assert sum(waste) <= BOUNDS.wasted * len(waste) + 1e-9
    assert gain >= 0


@given(chances, chances, seconds, seconds, st.floats(0, 8))
def test_a_surer_guess_never_gains_less(one: float, two: float, load: float, lead: float, position: float) -> None:
    economy = Economy(load, lead)
    assert economy.gain(max(one, two), position) >= economy.gain(min(one, two), position) - 1e-9
