"""Peers that decide alone what to hold: every expert keeps its holders, and the swarm comes to rest.

The simulated swarms are the worst case: all peers look at the same moment, and see nothing of what the others do at it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ExpertKey, PeerId
from moehive.swarm.policy.rebalance import FLOOR, Change, Place, View, lacking, rebalance

US, A, B, C = PeerId("us"), PeerId("a"), PeerId("b"), PeerId("c")
ONE, TWO, THREE = ExpertKey(0, 1), ExpertKey(0, 2), ExpertKey(1, 3)
ALL = frozenset((ONE, TWO, THREE))
ROOM = Place(8, 8)


def view(held: set[ExpertKey], holders: dict[ExpertKey, tuple[PeerId, ...]], us: PeerId = US) -> View:
    """Nobody else could take what lacks holders."""
    return View(us, (us,), holders, frozenset(held), ALL)


def changes(held: set[ExpertKey], holders: dict[ExpertKey, tuple[PeerId, ...]], place: Place) -> list[Change]:
    """What peers of thirty names would do in the same place: whose turn it is depends on the name."""
    views = (view(held, holders, PeerId(f"us {number}")) for number in range(30))
    return [change for one in views if (change := rebalance(one, place))]


class Slow(tuple[PeerId, ...]):
    """Holders that are searched one by one, which a thousand members would make a thousand times as slow."""

    def __contains__(self, peer: object) -> bool:
        raise AssertionError("searched for each peer")


def test_holders_are_not_searched_for_each_peer():
    holders = {ONE: Slow((A, B)), TWO: Slow((A, B)), THREE: Slow((A,))}
    seen = View(US, (A, B, US), holders, frozenset(), ALL, lacking={THREE: 9}, demand={ONE: 1.0})
    assert {ONE, THREE} <= set(rebalance(seen, ROOM).take)


@dataclass
class Simulated:
    """A swarm in which everybody looks at once. Whatever anybody held can be had again, as from a seed."""

    places: dict[PeerId, Place]
    held: dict[PeerId, frozenset[ExpertKey]]
    experts: frozenset[ExpertKey]
    demand: dict[ExpertKey, float] = field(default_factory=dict)
    lacking: dict[PeerId, dict[ExpertKey, int]] = field(default_factory=dict)
    looks: int = 0
    fetched: int = 0

    def copies(self) -> dict[ExpertKey, int]:
        return {key: sum(key in held for held in self.held.values()) for key in self.experts}

    def look(self) -> bool:
        """Everybody looks, then acts; whether anything changed."""
        changes = {peer: rebalance(self._view(peer), self.places[peer]) for peer in self.held}
        self.lacking = {peer: lacking(self._view(peer)) for peer in self.held}
        self.looks += 1
        for peer, change in changes.items():
            assert change.leave <= self.held[peer]
            assert not self.held[peer].intersection(change.take)
            self.held[peer] = self.held[peer] - change.leave | frozenset(change.take)
            self.fetched += len(change.take)
            assert len(self.held[peer]) <= self.places[peer].most
        return any(changes.values())

    def settle(self, most: int = 40) -> None:
        """Look until nothing changes and nobody waits for a turn."""
        quiet = 0
        for _ in range(most):
            quiet = 0 if self.look() else quiet + 1
            if quiet > 8:  # turns double with every look
                return
        raise AssertionError("never comes to rest")

    def _view(self, peer: PeerId) -> View:
        others = {other: held for other, held in self.held.items() if other != peer}
        holders = {key: tuple(other for other, held in others.items() if key in held) for key in self.experts}
        return View(
            peer,
            tuple(self.held),
            {key: those for key, those in holders.items() if those},
            self.held[peer],
            self.experts,
            self.lacking.get(peer, {}),
            self.demand,
            self.looks,
        )


@st.composite
def swarms(draw: st.DrawFn) -> Simulated:
    experts = frozenset(ExpertKey(layer, expert) for layer in range(draw(st.integers(1, 4))) for expert in range(6))
    count = draw(st.integers(2, 9))
    peers = [PeerId(f"peer {number}") for number in range(count)]
    places, held = {}, {}
    for peer in peers:
        fast = draw(st.integers(0, len(experts)))
        places[peer] = Place(fast, draw(st.integers(fast, len(experts))))
        held[peer] = frozenset(draw(st.permutations(sorted(experts)))[: draw(st.integers(0, fast))])
    demand = draw(st.dictionaries(st.sampled_from(sorted(experts)), st.floats(0.1, 100)))
    return Simulated(places, held, experts, demand)


@given(swarms())
def test_a_swarm_comes_to_rest_with_holders_for_as_much_as_fits(swarm: Simulated) -> None:
    before = swarm.copies()
    swarm.settle()
    after = swarm.copies()
    assert all(after[key] >= min(before[key], FLOOR) for key in swarm.experts)
    free = [peer for peer, place in swarm.places.items() if len(swarm.held[peer]) < place.fast]
    for key, count in after.items():  # whoever has room for what lacks a holder is one
        assert count >= FLOOR or all(key in swarm.held[peer] for peer in free)


@given(swarms(), st.integers(1, 5))
def test_nothing_falls_below_the_floor_at_any_look(swarm: Simulated, looks: int) -> None:
    for _ in range(looks):
        before = swarm.copies()
        swarm.look()
        after = swarm.copies()
        assert all(after[key] >= min(before[key], FLOOR) for key in swarm.experts)


@pytest.mark.parametrize("peers", [4, 12, 32])
def test_what_a_lost_peer_held_is_held_again_without_a_stampede(peers: int) -> None:
    experts = frozenset(ExpertKey(layer, expert) for layer in range(12) for expert in range(16))
    share = 2 * FLOOR * len(experts) // peers  # room for twice the floor
    names = [PeerId(f"peer {number}") for number in range(peers)]
    order = sorted(experts)
    held = {
        name: frozenset(order[(number * share // 2 + i) % len(order)] for i in range(share // 2))
        for number, name in enumerate(names)
    }
    swarm = Simulated(dict.fromkeys(names, Place(share, share)), held, experts)
    assert min(swarm.copies().values()) >= FLOOR
    lost = len(swarm.held.pop(names[0]))
    swarm.settle()
    assert min(swarm.copies().values()) >= FLOOR
    assert lost <= swarm.fetched <= 2 * lost


def test_what_nobody_holds_is_taken_at_once_and_what_one_holds_at_the_second_look() -> None:
    alone = View(US, (US, A), {TWO: (A,)}, frozenset(), ALL - {THREE})
    assert rebalance(alone, ROOM).take == (ONE,)
    assert lacking(alone) == {ONE: 1, TWO: 1}
    assert rebalance(replace(alone, lacking=lacking(alone)), ROOM).take == (ONE, TWO)


def test_room_for_what_is_lost_is_made_of_what_others_hold_enough_of() -> None:
    full = Place(2, 2)
    enough = {ONE: (A, B, C), TWO: (A,)}
    found = changes({ONE, TWO}, enough, full)
    assert set(found) == {Change((THREE,), frozenset({ONE}))}
    assert 0 < len(found) < 30  # two of the four holders of ONE may leave it
    assert not changes({ONE, TWO}, {ONE: (A,), TWO: (A,)}, full)


def test_where_there_is_room_nothing_makes_way() -> None:
    assert set(changes({ONE}, {ONE: (A, B, C), TWO: (A, B)}, Place(2, 2))) == {Change((THREE,))}


def test_what_one_peer_still_holds_is_not_worth_the_slower_form() -> None:
    seen = view({ONE, TWO}, {ONE: (A,), TWO: (A,), THREE: (A,)})
    assert not rebalance(replace(seen, lacking={THREE: 5}), Place(2, 3))
    assert rebalance(replace(seen, lacking={THREE: 5}), Place(3, 3)).take == (THREE,)


def test_what_is_lost_is_taken_as_it_is_stored_and_makes_way_later() -> None:
    place, held = Place(2, 3), {ONE, TWO}
    assert rebalance(view(held, {ONE: (A,), TWO: (A,)}), place) == Change((THREE,))
    later = {ONE: (A,), TWO: (A,), THREE: (A, B, C)}
    assert set(changes(held | {THREE}, later, place)) == {Change((), frozenset({THREE}))}


def test_demand_moves_holders_only_where_it_is_much_higher() -> None:
    seen = replace(view({ONE}, {ONE: (A, B), TWO: (A, B)}), obtainable=frozenset((ONE, TWO)))
    us = next(
        name for number in range(30) if rebalance(_asked(seen, name := PeerId(f"{number}"), 2.0, 9.0), Place(1, 1))
    )
    assert rebalance(_asked(seen, us, 2.0, 9.0), Place(1, 1)) == Change((TWO,), frozenset({ONE}))
    assert not rebalance(_asked(seen, us, 2.0, 5.9), Place(1, 1))
    assert rebalance(_asked(seen, us, 2.0, 0.1), Place(2, 2)) == Change((TWO,))
    assert not rebalance(_asked(seen, us, 2.0, 0.0), Place(2, 2))


def _asked(seen: View, us: PeerId, one: float, two: float) -> View:
    return replace(seen, us=us, peers=(us, A, B), demand={ONE: one, TWO: two})


def test_what_is_hot_is_taken_by_one_peer_in_a_turn() -> None:
    peers = tuple(PeerId(f"peer {number}") for number in range(20))
    seen = View(US, peers, {ONE: (A, B)}, frozenset(), frozenset((ONE,)), demand={ONE: 100.0})
    for turn in range(5):
        takers = [peer for peer in peers if rebalance(replace(seen, us=peer, turn=turn), ROOM)]
        assert len(takers) == 1


def test_what_nobody_holds_goes_before_what_one_peer_holds() -> None:
    seen = replace(view(set(), {ONE: (A,), TWO: (A,)}), lacking={ONE: 9, TWO: 9})
    assert rebalance(seen, Place(1, 1)).take == (THREE,)


def test_the_hot_are_held_by_more() -> None:
    experts = [ExpertKey(layer, expert) for layer in range(4) for expert in range(8)]
    names = [PeerId(f"peer {number}") for number in range(8)]
    held = {name: frozenset(experts[(4 * number + i) % 32] for i in range(12)) for number, name in enumerate(names)}
    hot = dict.fromkeys(experts[:4], 100.0) | dict.fromkeys(experts[4:], 1.0)
    swarm = Simulated(dict.fromkeys(names, Place(12, 12)), held, frozenset(experts), hot)
    assert set(swarm.copies().values()) == {3}
    for _ in range(200):
        swarm.look()
    copies = swarm.copies()
    assert min(copies[key] for key in experts[:4]) > 3
    assert min(copies.values()) >= FLOOR


def test_whose_turn_it_is_to_leave_changes_with_the_time() -> None:
    """Of three holders some may be told what to hold: then one of the others has its turn by and by."""
    full = View(US, (US, A, B, C), {ONE: (A, B), TWO: (C,)}, frozenset((ONE, THREE)), ALL)
    leaves = [rebalance(replace(full, turn=turn), Place(1, 1)).leave for turn in range(30)]
    assert {frozenset(), frozenset((ONE,))} == set(leaves)


def test_what_is_asked_for_least_makes_way() -> None:
    holders = {ONE: (A, B), TWO: (A, B)}
    full = View(US, (US,), holders, frozenset((ONE, TWO)), ALL, demand={ONE: 10.0, TWO: 1.0})
    both = [
        change.leave
        for turn in range(30)
        if len(rebalance(replace(full, turn=turn), Place(0, 0)).leave) == 2
        and (change := rebalance(replace(full, turn=turn), Place(2, 2)))
    ]
    assert set(both) == {frozenset((TWO,))}


def test_what_has_lacked_holders_for_longest_is_thought_about_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.swarm.policy.rebalance.CONSIDERED", 1)
    alone = View(US, (US,), {}, frozenset(), ALL, lacking={TWO: 3})
    assert rebalance(alone, ROOM).take == (TWO,)
