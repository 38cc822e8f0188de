from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from moehive.swarm.prefetch.control import Limits, Mode, State, Window, judge, start, tick

LIMITS = Limits()
GOOD = Window(0.9, loads=10, used_bytes=90, wasted_bytes=10)
PLAIN = Window(1.0, loads=0, used_bytes=0, wasted_bytes=0)
SLOW = replace(GOOD, seconds=1.2)
SLIGHTLY_SLOW = replace(GOOD, seconds=1.01)
WASTEFUL = replace(GOOD, used_bytes=60, wasted_bytes=40)


def after(*windows: Window, state: State | None = None) -> State:
    state = start(LIMITS) if state is None else state
    for window in windows:
        state = judge(state, window, LIMITS)
    return state


def test_first_tokens_are_measured_without_prefetch() -> None:
    assert start(LIMITS).mode is Mode.PLAIN
    assert not start(LIMITS).loading
    assert after(PLAIN).mode is Mode.TRIAL
    assert after(PLAIN).plain == 1.0


def test_a_trial_that_gains_goes_on() -> None:
    assert after(PLAIN, GOOD).mode is Mode.ON


def test_a_trial_without_gain_ends() -> None:
    for window in (SLOW, SLIGHTLY_SLOW, WASTEFUL, replace(GOOD, loads=0)):
        state = after(PLAIN, window)
        assert state.mode is Mode.REST
        assert state.left == LIMITS.rest
        assert state.reason


def test_a_quarter_of_the_bytes_may_be_wasted_and_no_more() -> None:
    assert after(PLAIN, replace(GOOD, used_bytes=75, wasted_bytes=25)).mode is Mode.ON
    assert after(PLAIN, replace(GOOD, used_bytes=74, wasted_bytes=26)).mode is Mode.REST


def test_what_runs_is_stopped_by_two_bad_windows_in_a_row_only() -> None:
    assert after(PLAIN, GOOD, SLOW).mode is Mode.ON
    assert after(PLAIN, GOOD, SLOW, GOOD, SLOW).mode is Mode.ON
    assert after(PLAIN, GOOD, SLOW, SLOW).mode is Mode.REST
    assert after(PLAIN, GOOD, WASTEFUL, SLOW).mode is Mode.REST


def test_what_runs_need_not_gain_all_the_time() -> None:
    assert after(PLAIN, GOOD, SLIGHTLY_SLOW, SLIGHTLY_SLOW, SLIGHTLY_SLOW).mode is Mode.ON


def test_after_a_rest_it_is_tried_again_against_the_tokens_of_the_rest() -> None:
    state = after(PLAIN, SLOW, replace(PLAIN, seconds=2.0))
    assert state.mode is Mode.TRIAL
    assert state.plain == 2.0
    assert after(SLOW, state=state).mode is Mode.ON


def test_rests_grow_up_to_a_limit() -> None:
    state, rests = after(PLAIN), []
    for _ in range(12):
        state = after(SLOW, state=state)
        rests.append(state.left)
        state = after(PLAIN, state=state)
    assert rests[:3] == [LIMITS.rest, 2 * LIMITS.rest, 4 * LIMITS.rest]
    assert rests[-1] == LIMITS.longest_rest


def test_a_long_good_time_is_a_reason_to_trust_again() -> None:
    state = after(PLAIN, SLOW, PLAIN, *[GOOD] * (1 + LIMITS.probe_every))
    assert state.mode is Mode.PLAIN
    assert state.rest == LIMITS.rest


def test_now_and_then_it_is_measured_anew_without_a_trial() -> None:
    state = after(PLAIN, *[GOOD] * (1 + LIMITS.probe_every))
    assert state.mode is Mode.PLAIN
    assert state.left == LIMITS.probe
    again = after(replace(PLAIN, seconds=0.5), state=state)
    assert again.mode is Mode.ON
    assert again.plain == 0.5


def test_a_tick_is_one_token() -> None:
    assert tick(start(LIMITS)).left == LIMITS.probe - 1


windows = st.builds(Window, st.floats(1e-6, 1e3), st.integers(0, 100), st.integers(0, 10**12), st.integers(0, 10**12))


@given(st.lists(windows, max_size=60))
def test_it_never_loads_for_long_against_the_bounds_and_always_comes_back(found: list[Window]) -> None:
    state, bad = start(LIMITS), 0
    for window in found:
        before, state = state, judge(state, window, LIMITS)
        faulty = window.wasted > LIMITS.wasted
        bad = bad + 1 if before.loading and faulty else 0
        assert bad < LIMITS.strikes or not state.loading
        assert 0 < state.left <= LIMITS.longest_rest
