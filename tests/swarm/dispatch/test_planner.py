"""Whom to ask: every expert exactly once, no peer without need, the layer done as soon as can be."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.planner import REQUEST_COST, PeerFacts, plan_layer
from moehive.swarm.policy.speed import Speed, expected_seconds

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
peers = st.sampled_from([A, B, C, PeerId("D")])
seconds = st.floats(0, 1)
speeds = st.builds(Speed, network=seconds, waited=seconds, computed=seconds, per_expert=seconds, per_row=seconds)
facts_of_peers = st.dictionaries(peers, st.builds(PeerFacts, speeds, st.integers(0, 5)))


def speed(network: float = 0.005, per_expert: float = 0.001, waited: float = 0.0) -> Speed:
    return Speed(answers=1, network=network, per_expert=per_expert, waited=waited, computed=8 * per_expert)


@given(
    rows=st.dictionaries(st.integers(0, 20), st.integers(1, 9)),
    local=st.sets(st.integers(0, 20)),
    holders=st.dictionaries(st.integers(0, 20), st.lists(peers, unique=True)),
    facts=facts_of_peers,
)
def test_every_expert_is_planned_once_and_only_with_a_holder(
    rows: dict[int, int], local: set[int], holders: dict[int, list[PeerId]], facts: dict[PeerId, PeerFacts]
) -> None:
    plan = plan_layer(rows, local=local, holders=holders, facts=facts)
    planned = [*plan.local, *plan.missing, *(expert for experts in plan.remote.values() for expert in experts)]
    assert sorted(planned) == sorted(rows)
    assert set(plan.local) == set(rows) & local
    assert all(peer in holders[expert] for peer, experts in plan.remote.items() for expert in experts)
    assert all(not holders.get(expert) for expert in plan.missing)
    assert all(experts == tuple(sorted(experts)) for experts in plan.remote.values())
    assert plan == plan_layer(rows, local=local, holders=holders, facts=facts)


def finish(plan: dict[PeerId, tuple[int, ...]], facts: dict[PeerId, PeerFacts]) -> float:
    """Seconds until the last peer of a plan has answered, one row for each expert."""
    known = {peer: facts.get(peer, PeerFacts()) for peer in plan}
    return max(
        expected_seconds(known[peer].speed, experts=len(share), rows=len(share), in_flight=known[peer].in_flight)
        for peer, share in plan.items()
    )


@given(
    holders=st.dictionaries(
        st.integers(0, 3), st.lists(st.sampled_from([A, B, C]), unique=True, min_size=1), min_size=1
    ),
    facts=facts_of_peers,
)
def test_the_plan_is_close_to_the_best_there_is(
    holders: dict[int, list[PeerId]], facts: dict[PeerId, PeerFacts]
) -> None:
    planned = dict(plan_layer(dict.fromkeys(holders, 1), local=(), holders=holders, facts=facts).remote)
    best = float("inf")
    for choice in product(*holders.values()):
        shares = {p: tuple(e for e, q in zip(holders, choice, strict=True) if q == p) for p in set(choice)}
        best = min(best, finish(shares, facts))
    assert finish(planned, facts) <= 2 * best + 4 * REQUEST_COST  # list scheduling's bound, and the price of requests


def test_one_peer_that_has_all_is_asked_instead_of_two_where_computing_costs_nothing() -> None:
    holders = {0: [A, B], 1: [B, C], 2: [B]}
    assert plan_layer({0: 1, 1: 1, 2: 1}, local=(), holders=holders, facts={}).remote == {B: (0, 1, 2)}


def test_two_peers_share_what_takes_one_of_them_long() -> None:
    holders = {expert: [A, B] for expert in range(8)}
    equal = {peer: PeerFacts(speed(per_expert=0.010)) for peer in (A, B)}
    plan = plan_layer(dict.fromkeys(range(8), 1), local=(), holders=holders, facts=equal)
    assert sorted(map(len, plan.remote.values())) == [4, 4]


def test_among_equals_the_one_expected_to_answer_first() -> None:
    holders = {0: [A, B]}
    quick = {A: PeerFacts(speed(network=0.010)), B: PeerFacts(speed(network=0.002))}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=quick).remote == {B: (0,)}
    busy = {A: PeerFacts(speed(network=0.010)), B: PeerFacts(speed(network=0.002), in_flight=9)}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=busy).remote == {A: (0,)}
    queue = {A: PeerFacts(speed(network=0.010)), B: PeerFacts(speed(network=0.002, waited=0.1))}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=queue).remote == {A: (0,)}


def test_many_rows_go_where_the_link_is_wide() -> None:
    near = Speed(answers=1, network=0.001, seconds_per_byte=1e-6)
    wide = Speed(answers=1, network=0.020, seconds_per_byte=1e-9)
    facts, holders = {A: PeerFacts(near), B: PeerFacts(wide)}, {0: [A, B]}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=facts, row_bytes=4096).remote == {A: (0,)}
    assert plan_layer({0: 512}, local=(), holders=holders, facts=facts, row_bytes=4096).remote == {B: (0,)}
