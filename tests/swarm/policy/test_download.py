"""The scheduler in virtual time: whatever the peers do, everything comes, once, and about as fast as it could."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.download_simulation import MB, NEVER, Outcome, Script, simulate

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.swarm.policy.download import RUN
from moehive.swarm.policy.pace import MAX_DEPTH

CHUNKS = 80  # an expert of 84 MB
CAP = Script(rate=50 * MB)


def rate_of(outcome: Outcome, chunks: int = CHUNKS) -> float:
    """Bytes per second."""
    return chunks * CHUNK_SIZE / outcome.time


# --- how fast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peers", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rtt", [0.001, 0.02])
def test_the_speeds_of_sources_add_up(peers: int, rtt: float) -> None:
    chunks = 100 * peers
    outcome = simulate({str(n): dataclasses.replace(CAP, rtt=rtt) for n in range(peers)}, [chunks])
    assert rate_of(outcome, chunks) >= 0.9 * peers * CAP.rate
    assert outcome.wasted == 0


TROUBLE = {
    "stalls from the start": Script(stalls=(0.0, NEVER)),
    "stalls while it sends": Script(stalls=(0.1, NEVER)),
    "stalls near the end": Script(stalls=(0.5, NEVER)),
    "a tenth of the speed": Script(rate=5 * MB),
    "a hundredth of the speed": Script(rate=0.5 * MB),
    "lies always": Script(wrong=frozenset(range(400))),
    "lies once": Script(wrong=frozenset({17})),
    "dies": Script(dies=0.2),
    "claims what it does not have": Script(have=frozenset(range(40)), claims=frozenset(range(80))),
    "is always busy": Script(slots=0),
    "far away": Script(rtt=0.4),
}


@pytest.mark.parametrize("what", TROUBLE)
@pytest.mark.parametrize("chunks", [CHUNKS, 400])
def test_one_bad_source_of_three_costs_next_to_nothing(what: str, chunks: int) -> None:
    without = simulate({"a": CAP, "b": CAP}, [chunks])
    outcome = simulate({"a": CAP, "b": CAP, "bad": TROUBLE[what]}, [chunks])
    assert outcome.time <= 1.25 * without.time
    assert outcome.wasted < 0.02 * chunks * CHUNK_SIZE


@pytest.mark.parametrize("rate", [5 * MB, 50 * MB, 400 * MB])
@pytest.mark.parametrize("wanted", [[1], [4], [9, 3], [1] * 20], ids=str)
def test_small_objects_do_not_wait_for_the_timeout_of_a_source_that_never_sent(wanted: list[int], rate: float) -> None:
    """A few chunk times of silence are enough to ask the other one, and nothing has to come twice for it."""
    good = Script(rate=rate)
    alone = simulate({"good": good}, wanted)
    outcome = simulate({"good": good, "silent": dataclasses.replace(good, stalls=(0.015, NEVER))}, wanted)
    assert outcome.time <= alone.time + 5 * CHUNK_SIZE / rate + 0.3
    assert outcome.wasted == 0


@pytest.mark.parametrize("silent_after", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("rate", [0.3 * MB, 1 * MB, 5 * MB])
def test_a_slow_source_that_falls_silent_is_never_worse_than_none(rate: float, silent_after: float) -> None:
    """Four of its chunk times would be 14 s. What it owes is asked of the other one once it is clearly overdue."""
    good = Script(rate=5 * MB)
    alone = simulate({"good": good}, [24, 22])
    outcome = simulate({"good": good, "slow": Script(rate=rate, stalls=(silent_after, NEVER))}, [24, 22])
    assert outcome.time <= alone.time
    assert outcome.wasted == 0


def test_a_source_that_hangs_for_a_while_is_used_again() -> None:
    outcome = simulate({"a": CAP, "b": Script(stalls=(0.5, 3.0))}, [800])
    assert outcome.sent["b"] > 0.3 * outcome.sent["a"]


def test_a_source_that_appears_late_is_used() -> None:
    outcome = simulate({"a": CAP, "b": Script(appears=1.0)}, [400])
    assert outcome.sent["b"] > 0.6 * outcome.sent["a"]


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_a_source_slower_than_every_timeout_is_not_lost(rate: float) -> None:
    assert simulate({"a": Script(rate=rate * MB)}, [3]).complete


def test_many_small_objects_flow_without_a_pause_for_each() -> None:
    """An object after the other would take 300 round trips: 24 s."""
    outcome = simulate({name: Script(rtt=0.08) for name in "abc"}, [1] * 300)
    assert rate_of(outcome, 300) > 0.8 * 3 * CAP.rate


def test_objects_are_finished_in_the_order_in_which_they_are_wanted() -> None:
    outcome = simulate({"a": CAP, "b": CAP}, [9] * 20)
    assert list(outcome.finished) == sorted(outcome.finished, key=lambda name: int(name.split()[1]))


def test_what_only_one_has_is_fetched_from_it_first() -> None:
    """Rarest first: the chunks of the slow one are under way all the time, or it would end alone."""
    rare = frozenset(range(70, 80))
    outcome = simulate({"a": Script(have=frozenset(range(70))), "b": Script(rate=10 * MB, have=rare)}, [CHUNKS])
    assert outcome.time < 1.25 * max(70 * CHUNK_SIZE / CAP.rate, 10 * CHUNK_SIZE / (10 * MB))


def test_a_last_resort_is_asked_only_for_what_nobody_has() -> None:
    outcome = simulate(
        {"a": Script(rate=5 * MB, have=frozenset(range(60))), "seed": Script(last_resort=True)}, [CHUNKS]
    )
    assert outcome.sent == {"a": 60 * CHUNK_SIZE, "seed": 20 * CHUNK_SIZE}


def test_a_last_resort_replaces_who_died() -> None:
    assert simulate({"a": Script(dies=0.2), "seed": Script(last_resort=True)}).complete


# --- always -------------------------------------------------------------------------------------------------------

times = st.floats(0.0, 4.0)
rates = st.sampled_from([0.3, 1, 5, 20, 50, 50, 120, 400]).map(lambda rate: rate * MB)
round_trips = st.sampled_from([0.0005, 0.005, 0.02, 0.08, 0.3])
chunk_sets = st.frozensets(st.integers(0, 39), max_size=40)
honest = st.builds(Script, rate=rates, rtt=round_trips, appears=times)
steady = st.builds(Script, rate=rates, rtt=round_trips)
anything = st.builds(
    Script,
    rate=rates,
    rtt=round_trips,
    have=st.none() | chunk_sets,
    claims=st.none() | chunk_sets,
    appears=times,
    stalls=st.just((NEVER, NEVER)) | st.tuples(times, st.just(NEVER) | st.floats(4.0, 20.0)),
    dies=st.just(NEVER) | times,
    wrong=st.just(frozenset()) | chunk_sets,
    slots=st.sampled_from([0, 1, 2, 64]),
    last_resort=st.booleans(),
)
objects = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def named(scripts: list[Script]) -> dict[str, Script]:
    return {f"peer {number}": script for number, script in enumerate(scripts)}


@given(st.lists(anything, max_size=4), honest, objects, st.text(max_size=4))
def test_everything_comes_while_an_honest_source_lives(
    others: list[Script], good: Script, wanted: list[int], seed: str
) -> None:
    outcome = simulate(named([*others, good]), wanted, seed=seed)
    assert outcome.complete
    assert outcome.asked_after_ban == 0
    assert outcome.two_owners_early == 0
    assert max(outcome.deepest.values()) <= MAX_DEPTH


@given(st.lists(anything, max_size=3), honest, honest, chunk_sets, st.text(max_size=4))
def test_everything_comes_while_honest_sources_have_it_together(
    others: list[Script], one: Script, two: Script, have: frozenset[int], seed: str
) -> None:
    parts = [
        dataclasses.replace(one, have=have),
        dataclasses.replace(two, have=frozenset(range(40)) - have),
    ]
    assert simulate(named([*others, *parts]), [40], seed=seed).complete


alike = st.builds(Script, rate=st.floats(20 * MB, 100 * MB), rtt=st.floats(0.001, 0.02))


@given(st.lists(alike, min_size=1, max_size=6), st.text(max_size=4))
@example(
    [Script(rate=33038210.0, rtt=1 / 128)] * 2
    + [Script(rate=55111937.0, rtt=1 / 64), Script(rate=58962848.0, rtt=1 / 64)],
    "",
)
@example([Script(rate=81e6)] * 2 + [Script(rate=100e6)] * 2, "")
def test_sources_that_are_not_too_different_send_nothing_twice(sources: list[Script], seed: str) -> None:
    assert simulate(named(sources), [CHUNKS], seed=seed).wasted < 0.02 * CHUNKS * CHUNK_SIZE


@given(st.lists(steady, min_size=1, max_size=6), st.text(max_size=4))
def test_a_source_that_is_overtaken_loses_what_it_has_on_the_wire(sources: list[Script], seed: str) -> None:
    """A thousand times slower, or a third of a second away: that cannot be called back."""
    outcome = simulate(named(sources), [CHUNKS], seed=seed)
    on_the_wire = sum(1 + source.rate * source.rtt / CHUNK_SIZE for source in sources)
    assert outcome.wasted <= on_the_wire * CHUNK_SIZE


@given(st.lists(steady, min_size=1, max_size=6), st.text(max_size=4))
@example([Script(rate=400 * MB, rtt=0.3), Script(rate=0.3 * MB, rtt=0.3)], "")
def test_nearly_as_fast_as_can_be(sources: list[Script], seed: str) -> None:
    """A source adds its rate, or next to nothing where it is slow, far or both; it never costs."""
    chunks = 200
    outcome = simulate(named(sources), [chunks], seed=seed)
    speeds = [min(source.rate, MAX_DEPTH * CHUNK_SIZE / source.rtt) for source in sources]
    start = 6 * max(source.rtt for source in sources)
    alone = chunks * CHUNK_SIZE / max(speeds) + start
    last = max(CHUNK_SIZE / source.rate for source in sources if CHUNK_SIZE / source.rate < alone)
    late = 0.2  # seconds: less is not worth sending chunks twice
    assert outcome.time <= 1.15 * alone + late
    assert outcome.time <= 1.15 * (chunks * CHUNK_SIZE / sum(speeds) + last + start) + late


@given(st.lists(anything, max_size=4), honest, objects, st.text(max_size=4))
def test_the_same_script_gives_the_same_history(
    others: list[Script], good: Script, wanted: list[int], seed: str
) -> None:
    scripts = named([*others, good])
    assert simulate(scripts, wanted, seed=seed) == simulate(scripts, wanted, seed=seed)


def test_runs_are_short_and_begin_at_a_place_of_our_own() -> None:
    firsts = {simulate({"a": CAP}, [400], seed=str(n)).first_chunk for n in range(10)}
    assert len(firsts) > 5
    assert simulate({"a": Script(rate=400 * MB)}, [400]).longest_run == RUN
