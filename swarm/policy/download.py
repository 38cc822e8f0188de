"""Whom to ask next for which chunks: a decision on facts, without I/O and without a clock.

Every chunk has one owner, whoever can be expected to send it first, until nothing is left to give out; then peers with
nothing to do duplicate what they would bring clearly sooner than its owner, and the loser is cancelled. One question
decides both: *when would the chunk come?* (see `expectation`). So a slow peer is given work early and none that would
end after everybody else's, and a silent one loses its last chunks within a few chunk times instead of a timeout.

Among chunks, those that the fewest peers have come first, beginning at a place of our own and going on in short runs:
downloaders that start together soon have different chunks to offer each other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moehive.protocol.bits import Bits, full, indices, lowest_from, run_from, span
from moehive.protocol.ids import PeerId

from .expectation import Flight, ItemKey, Queue, is_late, late_at, queue_of
from .pace import Pace

RUN = 8  # neighbouring chunks of one request, at most
MAX_IN_FLIGHT = 128  # chunks over all peers: what a careless carrier would hold in memory
GUESSED_RATE = 16e6  # bytes per second, while no peer has sent anything
SOONER = 1.5  # how many times sooner somebody else must be expected to bring a chunk, to be asked for it as well
HEAD_START = 0.05  # seconds that this must be worth besides, where its owner is silent
LONG_HEAD_START = 0.25  # the same where its owner is only slow: its bytes are on the wire, and would come twice
LOOK_AGAIN = 0.05  # seconds between looks at the clock while a peer with nothing to do leaves chunks to others
NEAR = 2.0  # seconds: a peer that is paused for less than that is waited for


@dataclass(frozen=True, slots=True)
class Item:
    """An object on its way."""

    key: ItemKey
    chunks: int
    missing: Bits  # not verified yet
    holders: Mapping[PeerId, Bits]  # which chunks each peer says that it can send
    start: int = 0  # the chunk to begin with: each downloader has its own, drawn at random
    urgent: bool = False  # goes before all that are not


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer that is not banned."""

    id: PeerId
    pace: Pace
    ready_at: float = 0.0  # it asked for, or deserves, a pause until then
    last_resort: bool = False  # only for what no other peer has


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the decision depends on."""

    now: float
    items: tuple[Item, ...]  # in the order in which they are wanted
    peers: tuple[Peer, ...]
    flights: tuple[Flight, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a peer for some chunks."""

    peer: PeerId
    item: ItemKey
    first: int
    count: int
    duplicate: bool = False  # somebody else is asked for them already


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now."""

    ask: tuple[Ask, ...] = ()
    cancel: tuple[int, ...] = ()  # flights that nobody waits for: others brought their chunks, or their peer is gone
    late: tuple[PeerId, ...] = ()  # peers whose timeout is over: take all of their flights back
    stalled: tuple[PeerId, ...] = ()  # those of them whose connections are given up
    stuck: tuple[ItemKey, ...] = ()  # objects of which nothing is under way, and nobody can be asked for any of it now
    wake: float = math.inf  # when to decide again if nothing happens until then


def plan(facts: Facts) -> Plan:
    """The next steps."""
    board = _Board(facts)
    ask = tuple(_fresh(board)) + tuple(_duplicates(board))
    return Plan(
        ask=ask,
        cancel=tuple(f.number for f in facts.flights if f.number not in board.kept and f.peer not in board.late),
        late=tuple(board.late),
        stalled=tuple(peer for peer in board.late if board.peers[peer].pace.stalled(facts.now)),
        stuck=tuple(item.key for item in facts.items if board.is_stuck(item)),
        wake=board.wake(),
    )


class _Board:
    """The facts, what follows from them, and what has been given out meanwhile."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.peers = {peer.id: peer for peer in facts.peers}
        missing = {item.key: item.missing for item in facts.items}
        wanted = [f for f in facts.flights if f.peer in self.peers and f.bits & missing.get(f.item, 0)]
        waiting = _by_peer(wanted)
        self.late = [peer.id for peer in facts.peers if is_late(peer.pace, waiting[peer.id], facts.now)]
        kept = [flight for flight in wanted if flight.peer not in self.late]
        self.kept = {flight.number for flight in kept}
        self.flights = _by_peer(sorted(kept, key=lambda flight: flight.number))
        self.owned: defaultdict[ItemKey, Bits] = defaultdict(int)
        for flight in kept:
            self.owned[flight.item] |= flight.bits
        self.left = MAX_IN_FLIGHT - sum(flight.count for flight in kept)
        rates = [peer.pace.rate for peer in facts.peers if peer.pace.rate]
        guess = sum(rates) / len(rates) if rates else GUESSED_RATE
        self.queues = {p.id: queue_of(p.pace, self.flights[p.id], facts.now, guess) for p in facts.peers}
        usable = [peer for peer in facts.peers if peer.ready_at <= facts.now and peer.id not in self.late]
        self.usable = sorted(usable, key=lambda peer: (self.queues[peer.id].when(1), peer.id))  # the soonest first
        self.items = {peer.id: self._items_for(peer.id) for peer in usable}
        self.room = {peer.id: self._room(peer) for peer in usable}
        self.asked: set[PeerId] = set()
        self.watching = False

    def _items_for(self, peer: PeerId) -> list[Item]:
        """What a peer works on, in order: nothing else while it has something urgent."""
        items = [item for item in self.facts.items if item.missing & item.holders.get(peer, 0)]
        return [item for item in items if item.urgent] or items

    def _room(self, peer: Peer) -> int:
        """How many more chunks it may be asked for. What runs out beside something urgent does not count."""
        items = self.items[peer.id]
        urgent = {item.key for item in items if item.urgent}
        due = sum(f.count for f in self.flights[peer.id] if not urgent or f.item in urgent)
        return peer.pace.depth - due

    def give(self, ask: Ask) -> Ask:
        """Note what is asked."""
        self.queues[ask.peer].add(ask.count)
        self.room[ask.peer] -= ask.count
        self.left -= ask.count
        self.owned[ask.item] |= span(ask.first, ask.count)
        self.asked.add(ask.peer)
        return ask

    def open(self, item: Item) -> Bits:
        """What nobody has been asked for."""
        return item.missing & ~self.owned[item.key]

    def is_idle(self, peer: PeerId) -> bool:
        """Whether it has room, and nothing is left that nobody has been asked for."""
        return self.limit(peer) > 0 and not any(self.open(item) & item.holders[peer] for item in self.items[peer])

    def limit(self, peer: PeerId) -> int:
        """How many chunks the next request to a peer may have."""
        return min(RUN, self.room[peer], self.left)

    def is_stuck(self, item: Item) -> bool:
        """Whether nothing of an object is under way, and nobody can be asked for any of it now."""
        reachable = any(item.missing & item.holders.get(peer.id, 0) for peer in self.usable)
        return bool(item.missing) and not self.owned[item.key] and not reachable

    def wake(self) -> float:
        """When time alone changes the decision."""
        now = self.facts.now
        times = [peer.ready_at for peer in self.facts.peers if peer.ready_at > now]
        times += [late_at(self.peers[peer].pace, flights) for peer, flights in self.flights.items() if flights]
        times += [now + self.peers[peer].pace.timeout for peer in self.asked]
        if self.watching:
            times.append(now + LOOK_AGAIN)
        return min(times, default=math.inf)


def _by_peer(flights: list[Flight]) -> defaultdict[PeerId, list[Flight]]:
    by_peer: defaultdict[PeerId, list[Flight]] = defaultdict(list)
    for flight in flights:
        by_peer[flight.peer].append(flight)
    return by_peer


# --- chunks that nobody was asked for -----------------------------------------------------------------------------


def batch(pace: Pace) -> int:
    """How many chunks there must be room for before a peer is asked again: lest each chunk becomes a request."""
    return max(1, min(RUN, pace.depth // 2))


def _fresh(board: _Board) -> Iterator[Ask]:
    """Requests for all who have room."""
    for peer in board.usable:
        for item in board.items[peer.id]:
            while ask := _next_run(board, peer, item):
                yield board.give(ask)


def _next_run(board: _Board, peer: Peer, item: Item) -> Ask | None:
    """The next run of an object for a peer.

    None where it has none, or has no room for what it should have, or others would have brought all of it before.
    """
    candidates = board.open(item) & item.holders[peer.id]
    if peer.last_resort:
        candidates &= ~_had_by_others(board, item)
    if board.limit(peer.id) < max(1, min(batch(peer.pace), candidates.bit_count())) or not candidates:
        return None
    rarest = _rarest(board, item, candidates)
    first = lowest_from(rarest, item.start)
    count = _worth(board, peer, item, candidates, run_from(rarest, first, board.limit(peer.id)))
    board.watching |= not count  # who is expected to be sooner may say nothing any more
    return Ask(peer.id, item.key, first, count) if count else None


def _had_by_others(board: _Board, item: Item) -> Bits:
    """What peers have that are no last resort, and that can be asked soon."""
    had = 0
    for peer in board.facts.peers:
        if not peer.last_resort and peer.ready_at <= board.facts.now + NEAR:
            had |= item.holders.get(peer.id, 0)
    return had


def _rarest(board: _Board, item: Item, candidates: Bits) -> Bits:
    """Those of the candidates that the fewest peers have."""
    every = full(item.chunks)
    several: list[Bits] = []  # several[k]: what more than k peers have; who has everything makes no difference
    for peer in board.usable:
        have = item.holders.get(peer.id, 0)
        if have and have & every != every:
            several.append(0)
            for k in range(len(several) - 1, 0, -1):
                several[k] |= several[k - 1] & have
            several[0] |= have
    return next((rare for common in several if (rare := candidates & ~common)), candidates)


def _worth(board: _Board, peer: Peer, item: Item, candidates: Bits, count: int) -> int:
    """How many of `count` chunks a peer would bring before others, busy as they are, had brought all candidates."""
    others = [
        board.queues[other.id]
        for other in board.usable
        if other is not peer and not other.last_resort and item.holders.get(other.id, 0) & candidates
    ]
    queue, waiting = board.queues[peer.id], candidates.bit_count()
    for number in range(count):
        when = queue.when(number + 1)
        if sum(other.sooner_than(when) for other in others) >= waiting - number:
            return number
    return count


# --- the end: chunks that somebody else should have sent ------------------------------------------------------------


def _duplicates(board: _Board) -> Iterator[Ask]:
    """Requests for chunks under way, to peers for whom nothing fresh is left, where they bring them clearly sooner."""
    idle = [peer for peer in board.usable if not peer.last_resort and board.is_idle(peer.id)]
    for item in board.facts.items:
        helpers = [peer for peer in idle if item in board.items[peer.id]]
        by_then = _by_then(board, item) if helpers else {}
        for peer in helpers:
            yield from _duplicates_for(board, peer, item, by_then)


def _by_then(board: _Board, item: Item) -> dict[int, float]:
    """For each chunk under way: by when, in seconds from now, somebody else must bring it to be clearly sooner."""
    by_then: dict[int, float] = {}
    for peer, flights in board.flights.items():
        queue, ahead = board.queues[peer], 0
        for flight in flights:
            for place, index in enumerate(range(flight.next, flight.stop)):
                if flight.item == item.key and item.missing >> index & 1:
                    limit = _clearly_before(queue.first + (ahead + place) * queue.gap, queue)
                    by_then[index] = min(limit, by_then.get(index, limit))
            ahead += flight.count
    return by_then


def _clearly_before(when: float, queue: Queue) -> float:
    """The head start is a round trip at least: a chunk that is on the wire already cannot be cancelled."""
    return (when - max(HEAD_START if queue.silent else LONG_HEAD_START, queue.rtt)) / SOONER


def _duplicates_for(board: _Board, peer: Peer, item: Item, by_then: dict[int, float]) -> Iterator[Ask]:
    """One peer's share. Requests begin with their lowest chunk, so what is taken over is taken from their ends."""
    queue = board.queues[peer.id]
    mine = sum(flight.bits for flight in board.flights[peer.id] if flight.item == item.key)
    have = item.holders[peer.id] & item.missing & ~mine
    while board.limit(peer.id) > 0 and (late := [index for index in indices(have) if index in by_then]):
        board.watching = True
        last = max(late, key=lambda index: (by_then[index], index))
        count = 0
        while count < board.limit(peer.id) and last - count in late and by_then[last - count] > queue.when(count + 1):
            count += 1
        if not count:
            return
        run = range(last - count + 1, last + 1)
        have &= ~span(run.start, count)
        by_then |= {index: min(by_then[index], _clearly_before(queue.when(count), queue)) for index in run}
        yield board.give(Ask(peer.id, item.key, run.start, count, duplicate=True))
