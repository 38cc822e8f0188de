"""Whom to ask: every expert exactly once, few peers, the quicker one among equals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.planner import PeerFacts, plan_layer

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
peers = st.sampled_from([A, B, C, PeerId("D")])


@given(
    rows=st.dictionaries(st.integers(0, 20), st.integers(1, 9)),
    local=st.sets(st.integers(0, 20)),
    holders=st.dictionaries(st.integers(0, 20), st.lists(peers, unique=True)),
    facts=st.dictionaries(peers, st.builds(PeerFacts, st.floats(0, 10), st.integers(0, 5))),
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


def test_one_peer_that_has_all_is_asked_instead_of_two() -> None:
    holders = {0: [A, B], 1: [B, C], 2: [B]}
    assert plan_layer({0: 1, 1: 1, 2: 1}, local=(), holders=holders, facts={}).remote == {B: (0, 1, 2)}


def test_among_equals_the_one_expected_to_answer_first() -> None:
    holders = {0: [A, B]}
    quick = {A: PeerFacts(latency=0.010), B: PeerFacts(latency=0.002)}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=quick).remote == {B: (0,)}
    busy = {A: PeerFacts(latency=0.010), B: PeerFacts(latency=0.002, in_flight=9)}
    assert plan_layer({0: 1}, local=(), holders=holders, facts=busy).remote == {A: (0,)}
