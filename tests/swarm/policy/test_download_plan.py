"""Single decisions of the scheduler, on facts written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from moehive.protocol.bits import Bits, full, span
from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.policy.download import LOOK_AGAIN, MAX_IN_FLIGHT, NEAR, RUN, Facts, Item, Peer, plan
from moehive.swarm.policy.expectation import Flight, ItemKey
from moehive.swarm.policy.pace import MIN_DEPTH, MIN_TIMEOUT, STALLED, Pace

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
X, Y = ItemKey("x"), ItemKey("y")
NOW = 1000.0


def pace(rate: float = 50e6, *, heard: float = NOW, **changes: object) -> Pace:
    """A peer that has sent a chunk just now."""
    known = {"received": rate, "busy": 1.0, "rtt": 0.01, "wait": 0.1, "heard": heard, "quiet_since": heard}
    return Pace(**(known | changes))  # type: ignore[arg-type]


def item(
    key: ItemKey = X, chunks: int = 100, holders: Iterable[PeerId] | Mapping[PeerId, Bits] = (A, B), **changes: object
) -> Item:
    have = holders if isinstance(holders, Mapping) else dict.fromkeys(holders, EVERYTHING)
    known: dict[str, object] = {"key": key, "chunks": chunks, "missing": full(chunks), "holders": have}
    return Item(**(known | changes))  # type: ignore[arg-type]


def flight(number: int, peer: PeerId, first: int, count: int, key: ItemKey = X, heard: float = NOW) -> Flight:
    return Flight(number, peer, key, first, first + count, heard)


def facts(items: list[Item], peers: list[Peer], flights: list[Flight] = []) -> Facts:  # noqa: B006 - not changed
    return Facts(NOW, tuple(items), tuple(peers), tuple(flights))


def asked(decided: object, peer: PeerId, key: ItemKey = X) -> int:
    """Chunks."""
    return sum(ask.count for ask in decided.ask if (ask.peer, ask.item) == (peer, key))  # type: ignore[attr-defined]


def test_a_stranger_is_asked_for_little_and_a_known_peer_for_half_a_second() -> None:
    decided = plan(facts([item()], [Peer(A, Pace()), Peer(B, pace())]))
    assert asked(decided, A) == MIN_DEPTH
    assert asked(decided, B) == 24  # of 25: for less than 8 chunks it is not asked again
    assert all(ask.count <= RUN for ask in decided.ask)


def test_no_chunk_is_asked_for_twice() -> None:
    decided = plan(facts([item()], [Peer(A, pace()), Peer(B, pace())], [flight(1, A, 0, 8)]))
    seen = span(0, 8)
    for ask in decided.ask:
        assert not seen & span(ask.first, ask.count)
        seen |= span(ask.first, ask.count)


def test_it_begins_at_its_own_place_and_goes_round() -> None:
    decided = plan(facts([item(chunks=20, start=17, holders=(A,))], [Peer(A, pace())]))
    assert [(ask.first, ask.count) for ask in decided.ask] == [(17, 3), (0, 8), (8, 8), (16, 1)]


def test_what_few_have_comes_first() -> None:
    holders = {A: EVERYTHING, B: full(90), C: full(80)}
    peers = [Peer(A, pace()), Peer(B, Pace()), Peer(C, Pace())]
    decided = plan(facts([item(holders=holders)], peers))
    first = [ask for ask in decided.ask if ask.peer == A][:2]
    assert [(ask.first, ask.count) for ask in first] == [(90, 8), (98, 2)]


def test_who_is_paused_gets_nothing_until_then() -> None:
    decided = plan(facts([item(holders=(A,))], [Peer(A, pace(), ready_at=NOW + 0.3)]))
    assert not decided.ask
    assert decided.wake == NOW + 0.3
    assert decided.stuck == (X,)


def test_what_others_brought_is_cancelled_and_what_a_gone_peer_owed_too() -> None:
    missing = full(100) & ~span(8, 8)
    flights = [flight(1, A, 0, 8), flight(2, A, 8, 8), flight(3, C, 16, 8)]  # C is not connected any more
    decided = plan(facts([item(missing=missing)], [Peer(A, pace()), Peer(B, pace())], flights))
    assert decided.cancel == (2, 3)
    assert any(ask.first <= 16 < ask.first + ask.count for ask in decided.ask)


def test_a_silent_peer_loses_its_chunks_after_its_timeout_and_its_connection_later() -> None:
    for silence, late, stalled in [(MIN_TIMEOUT - 0.1, (), ()), (MIN_TIMEOUT, (A,), ()), (STALLED, (A,), (A,))]:
        since = NOW - silence
        decided = plan(
            facts([item()], [Peer(A, pace(heard=since)), Peer(B, pace())], [flight(1, A, 0, 8, heard=since)])
        )
        assert (decided.late, decided.stalled) == (late, stalled)
        assert not decided.cancel
        assert not asked(decided, A)
        taken_over = any(not ask.duplicate and ask.first < 8 for ask in decided.ask if ask.peer == B)
        assert taken_over == bool(late)


def test_time_alone_makes_a_peer_late() -> None:
    decided = plan(facts([item(holders=(A,))], [Peer(A, pace())], [flight(1, A, 0, 25)]))
    assert decided.wake == NOW + MIN_TIMEOUT
    first_ever = plan(facts([item(holders=(A,))], [Peer(A, pace())]))
    assert first_ever.wake == NOW + MIN_TIMEOUT  # also for what is only just being asked


def test_a_request_that_waits_far_longer_than_others_makes_its_peer_late() -> None:
    forgotten = flight(1, A, 0, 8, heard=NOW - 4 * MIN_TIMEOUT)
    decided = plan(facts([item()], [Peer(A, pace())], [forgotten, flight(2, A, 8, 8)]))
    assert decided.late == (A,)


def test_what_is_urgent_goes_first_and_does_not_wait_for_the_rest() -> None:
    items = [item(X), item(Y, urgent=True, holders=(A,))]
    background = [flight(n, A, 8 * n, 8) for n in range(4)]  # as much as A may have
    decided = plan(facts(items, [Peer(A, pace()), Peer(B, pace())], background))
    assert asked(decided, A, Y) == 24
    assert asked(decided, A, X) == 0
    assert asked(decided, B, X) == 24  # who has nothing of it goes on
    without = plan(facts(items[:1], [Peer(A, pace())], background))
    assert not without.ask


def test_the_last_chunks_of_a_silent_peer_are_asked_from_an_idle_one_too() -> None:
    missing = span(0, 8)
    silent = Peer(A, pace(heard=NOW - 0.5))
    decided = plan(facts([item(missing=missing)], [silent, Peer(B, pace())], [flight(1, A, 0, 8, heard=NOW - 0.5)]))
    assert decided.ask
    assert all(ask.duplicate and ask.peer == B for ask in decided.ask)
    assert decided.ask[0].first + decided.ask[0].count == 8  # from the end: it may still begin
    busy = plan(facts([item(missing=missing)], [Peer(A, pace()), Peer(B, pace())], [flight(1, A, 0, 8)]))
    assert not busy.ask
    assert busy.wake < NOW + 0.1  # watched


def test_of_several_idle_peers_the_fastest_takes_over() -> None:
    silent = Peer(A, pace(heard=NOW - 0.5))
    for fast, slow in ((B, C), (C, B)):
        peers = [silent, Peer(fast, pace(80e6)), Peer(slow, pace(40e6))]
        what = item(missing=span(0, 1), holders=(A, B, C))
        decided = plan(facts([what], peers, [flight(1, A, 0, 1, heard=NOW - 0.5)]))
        assert [(ask.peer, ask.duplicate) for ask in decided.ask] == [(fast, True)]


def test_a_slow_peer_gets_no_chunk_that_others_would_have_brought_by_then() -> None:
    """Ten chunks are left: 0.1 s for two fast ones. A slow one needs 0.2 s for a single chunk."""
    missing = span(0, 10)
    slow = Peer(C, pace(5e6))
    decided = plan(facts([item(missing=missing, holders=(A, B, C))], [Peer(A, pace()), Peer(B, pace()), slow]))
    assert asked(decided, C) == 0
    assert decided.wake == NOW + LOOK_AGAIN  # they may fall silent
    alone = plan(facts([item(missing=missing, holders=(C,))], [slow]))
    assert asked(alone, C) == slow.pace.depth


def test_a_last_resort_waits_for_those_who_will_be_back_soon() -> None:
    holders = {A: full(60), C: EVERYTHING}
    seed = Peer(C, pace(), last_resort=True)
    for ready_at, first in [(NOW, 60), (NOW + NEAR / 2, 60), (NOW + 2 * NEAR, 0)]:
        decided = plan(facts([item(holders=holders)], [Peer(A, pace(), ready_at=ready_at), seed]))
        assert min(ask.first for ask in decided.ask if ask.peer == C) == first


def test_memory_is_bounded_whatever_the_number_of_peers() -> None:
    names = [PeerId(f"peer {n}") for n in range(40)]
    decided = plan(facts([item(chunks=5000, holders=tuple(names))], [Peer(name, pace()) for name in names]))
    assert sum(ask.count for ask in decided.ask) == MAX_IN_FLIGHT


def test_nothing_to_do() -> None:
    decided = plan(facts([], [Peer(A, pace())]))
    assert (decided.ask, decided.wake, decided.stuck) == ((), math.inf, ())
    assert plan(facts([item(missing=0)], [Peer(A, pace())])).stuck == ()


def test_a_chunk_is_a_mebibyte() -> None:
    """What the figures above are made of."""
    assert math.ceil(50e6 * 0.51 / CHUNK_SIZE) == 25
