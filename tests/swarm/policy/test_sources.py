"""Whom to connect to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import PeerId
from moehive.swarm.policy.sources import FULL, PARTIAL, Candidate, choose

candidates = st.builds(
    Candidate,
    connected=st.booleans(),
    rate=st.floats(0, 1e9),
    ready_at=st.sampled_from([0.0, 0.0, 200.0]),
    partial=st.booleans(),
    last_resort=st.booleans(),
)
worlds = st.dictionaries(st.integers(0, 99).map(lambda number: PeerId(f"peer {number}")), candidates, max_size=30)


@given(worlds, st.text(max_size=3))
def test_few_of_those_who_may_be_bothered(world: dict[PeerId, Candidate], seed: str) -> None:
    chosen = choose(world, 100.0, seed)
    assert len(set(chosen)) == len(chosen)
    assert all(world[peer].ready_at <= 100.0 for peer in chosen)
    regular = [peer for peer in chosen if not world[peer].last_resort]
    assert sum(not world[peer].partial for peer in regular) <= FULL
    assert sum(world[peer].partial for peer in regular) <= PARTIAL
    usable = {peer for peer, candidate in world.items() if candidate.ready_at <= 100.0}
    assert bool(chosen) == bool(usable)
    assert choose(world, 100.0, seed) == chosen


def test_the_fastest_that_are_connected_and_one_stranger() -> None:
    world = {PeerId(f"known {n}"): Candidate(connected=True, rate=float(n)) for n in range(10)}
    world |= {PeerId(f"new {n}"): Candidate() for n in range(3)}
    chosen = choose(world, 0.0, "")
    assert chosen[: FULL - 1] == [f"known {n}" for n in (9, 8, 7, 6, 5)]
    assert chosen[-1].startswith("new")


def test_each_downloader_has_its_own_order_of_strangers() -> None:
    world = {PeerId(f"new {n}"): Candidate() for n in range(40)}
    assert len({tuple(choose(world, 0.0, str(seed))) for seed in range(10)}) == 10


def test_a_last_resort_only_where_nobody_else_has_everything() -> None:
    seed, full, part = PeerId("seed"), PeerId("full"), PeerId("part")
    world = {seed: Candidate(last_resort=True), part: Candidate(partial=True)}
    assert set(choose(world, 0.0, "")) == {seed, part}
    assert set(choose(world | {full: Candidate()}, 0.0, "")) == {full, part}
