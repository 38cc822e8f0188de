"""What is wanted, who has it, what is under way: the memory between `policy.download` and whoever acts on its plans.

No I/O and no clock: times come with the events, so the same code runs in virtual time (tests) and in the engine. It
also judges: a proven lie bans in the standings that everything shares; what may be the network's fault only pauses the
peer, and only for downloads.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from moehive.protocol.bits import Bits
from moehive.protocol.errors import (
    FalseClaim,
    IntegrityError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalCode,
)
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.claims import ASK_AGAIN, EVERYTHING, Claim, after_have, after_refusal
from moehive.swarm.policy.download import Ask, Facts, Item, Peer, Plan, batch, plan
from moehive.swarm.policy.expectation import Flight, ItemKey
from moehive.swarm.policy.pace import (
    Pace,
    after_answer,
    after_asking,
    after_busy,
    after_chunk,
    after_release,
    after_timeout,
)
from moehive.swarm.policy.standing import Offence
from moehive.swarm.standings import Standings, offence_of

MAX_PACES = 1024  # peers that are not connected, whose pace is remembered


@dataclass(slots=True)
class Counters:
    """What came since the start."""

    received: int = 0  # bytes, verified and new
    duplicate: int = 0  # bytes, verified, but somebody else was faster
    wrong: int = 0  # answers that did not match their hash


@dataclass(frozen=True, slots=True)
class Steps:
    """What the engine is to do."""

    start: tuple[Flight, ...] = ()  # requests to send
    cancel: tuple[int, ...] = ()  # requests to withdraw; they are forgotten already
    close: tuple[PeerId, ...] = ()  # connections to give up; forgotten already, with their requests
    questions: tuple[tuple[PeerId, ItemKey], ...] = ()  # peers to be asked which chunks of an object they have
    stuck: tuple[ItemKey, ...] = ()  # objects that nobody can go on with now
    wake: float = 0.0  # when to ask for steps again if nothing happens until then


@dataclass(slots=True)
class _Wanted:
    key: ItemKey
    urgent: bool
    chunks: int = 0  # 0: not known yet
    missing: Bits = 0
    start: int = 0
    claims: dict[PeerId, Claim] = field(default_factory=dict)
    reasons: dict[PeerId, str] = field(default_factory=dict)


class Traffic:
    """Bookkeeping of all downloads of one process."""

    def __init__(self, standings: Standings, pauses: Standings, *, seed: str = "") -> None:
        self.counters = Counters()
        self.due = True  # whether something happened that may change what is to be done
        self._standings = standings
        self._pauses = pauses
        self._seed = seed
        self._items: dict[ItemKey, _Wanted] = {}
        self._peers: dict[PeerId, bool] = {}  # the connected ones: whether they are a last resort
        self._paces: OrderedDict[PeerId, Pace] = OrderedDict()
        self._flights: dict[int, Flight] = {}
        self._last_number = 0
        self._asking: set[tuple[PeerId, ItemKey]] = set()  # questions without an answer
        self._cancel: list[int] = []  # with the next steps
        self._close: list[PeerId] = []

    # --- objects --------------------------------------------------------------------------------------------------

    def begin(self, key: ItemKey, *, urgent: bool = False) -> None:
        """An object is wanted; nothing is asked for before `open`."""
        assert key not in self._items, key
        self._items[key] = _Wanted(key, urgent)

    def open(self, key: ItemKey, chunks: int, missing: Bits) -> None:
        """It has so many chunks, of which `missing` are to be got."""
        self.due = True
        item = self._items[key]
        item.chunks, item.missing = chunks, missing
        item.start = Random(f"{self._seed}/{key}").randrange(max(chunks, 1))

    def end(self, key: ItemKey) -> None:
        """It is not wanted any more: complete, or given up."""
        self.due = True
        del self._items[key]
        self._asking = {question for question in self._asking if question[1] != key}
        self._take_back([flight for flight in self._flights.values() if flight.item == key])

    def missing(self, key: ItemKey) -> Bits:
        """The chunks that are not verified yet."""
        return self._items[key].missing

    def reasons(self, key: ItemKey) -> Mapping[PeerId, str]:
        """What was wrong last with each peer that failed with an object."""
        return self._items[key].reasons

    # --- peers ----------------------------------------------------------------------------------------------------

    def connected(self, peer: PeerId, *, last_resort: bool = False) -> None:
        """It can be asked from now on."""
        self.due = True
        self._peers[peer] = last_resort
        self._set_pace(peer, after_release(self._pace(peer)))

    def disconnected(self, peer: PeerId) -> None:
        """It cannot be asked any more; what was under way is taken back."""
        self.due = True
        if self._peers.pop(peer, None) is not None:
            self._take_back(self._flights_of(peer))
            self._asking = {question for question in self._asking if question[0] != peer}
            for item in self._items.values():
                if (claim := item.claims.pop(peer, None)) and claim.refuted:  # this is not forgotten by hanging up
                    item.claims[peer] = Claim(refuted=claim.refuted, ask_at=-math.inf)

    def ready_at(self, peer: PeerId) -> float:
        """From when on a peer may be bothered again."""
        return max(self._standings.ready_at(peer), self._pauses.ready_at(peer))

    def rate(self, peer: PeerId) -> float:
        """Bytes per second that a peer sends while it sends; 0 where that is not known."""
        return self._pace(peer).rate

    def sending(self) -> Mapping[PeerId, float]:
        """Peers that owe us chunks, and their rates."""
        return {flight.peer: self.rate(flight.peer) for flight in self._flights.values()}

    # --- claims ---------------------------------------------------------------------------------------------------

    def offers(self, peer: PeerId, key: ItemKey, now: float, *, partial: bool) -> None:
        """A peer is said to have an object, or with `partial` some of it. What it says itself is not overwritten."""
        item = self._items[key]
        if peer not in item.claims:
            self.due = True
            item.claims[peer] = Claim(ask_at=now) if partial else after_have(Claim(), EVERYTHING, now)

    def claimed(self, peer: PeerId, key: ItemKey, have: Bits, now: float) -> None:
        """A peer answered which chunks of an object it has."""
        self.due = True
        self._asking.discard((peer, key))
        if item := self._items.get(key):
            item.claims[peer] = after_have(item.claims.get(peer, Claim()), have, now)

    def have(self, peer: PeerId, key: ItemKey) -> Bits:
        """What a peer says that it has of an object."""
        item = self._items.get(key)
        return item.claims.get(peer, Claim()).have if item else 0

    def is_used(self, peer: PeerId, key: ItemKey) -> bool:
        """Whether a connected peer is known to have, or being asked for what it has of, an object."""
        return peer in self._peers and peer in self._items[key].claims

    def refuses(self, peer: PeerId, key: ItemKey, now: float) -> bool:
        """Whether a peer said, not long ago, that it has nothing of an object."""
        claim = self._items[key].claims.get(peer)
        return claim is not None and not claim.have and claim.ask_at is not None and claim.ask_at > now

    def is_asking(self, key: ItemKey) -> bool:
        """Whether a peer has not answered yet what it has of an object."""
        return any(asked == key for _, asked in self._asking)

    def answered(self, peer: PeerId, seconds: float) -> None:
        """A small request took so long."""
        self._set_pace(peer, after_answer(self._pace(peer), seconds))

    # --- requests -------------------------------------------------------------------------------------------------

    def chunk(self, number: int, key: ItemKey, index: int, size: int, now: float) -> bool:
        """A chunk came and was verified; whether it is news."""
        flight, item = self._flights.get(number), self._items.get(key)
        if flight is not None:
            self._flights[number] = replace(flight, next=index + 1, heard=now)
            more = index + 1 < flight.stop or len(self._flights_of(flight.peer)) > 1
            pace = after_chunk(self._pace(flight.peer), size, now - flight.heard, now, more=more)
            self._set_pace(flight.peer, pace)
            self._pauses.praise(flight.peer)
            self.due |= self._changes_plans(self._flights[number], index)
        news = item is not None and bool(item.missing >> index & 1)
        if item is not None and news:
            item.missing &= ~(1 << index)
            self.counters.received += size
        else:
            self.counters.duplicate += size
        return news

    def _changes_plans(self, flight: Flight, index: int) -> bool:
        """Whether a chunk that just came makes room for a request, or ends the race for itself."""
        pace = self._pace(flight.peer)
        room = pace.depth - sum(other.count for other in self._flights_of(flight.peer))
        raced = any(f.item == flight.item and f.next <= index < f.stop for f in self._flights.values())
        return raced or room >= batch(pace)

    def finished(self, number: int, now: float) -> None:
        """A request ended without an error."""
        self.due = True
        flight = self._flights.get(number)
        if flight is not None and flight.count:
            self.failed(number, PeerUnreachable("a request ended before its last chunk", peer=flight.peer), now)
        elif flight is not None:
            self._drop(flight)

    def failed(self, number: int, error: PeerError, now: float) -> None:
        """A request failed. One that was taken back already is nobody's fault."""
        self.due = True
        flight = self._flights.get(number)
        if flight is None:
            return
        error.peer = error.peer or flight.peer
        in_flight = sum(other.count for other in self._flights_of(flight.peer))
        self._drop(flight, excused=not isinstance(error, PeerTimeout))
        if isinstance(error, PeerRefused) and error.code is RefusalCode.BUSY:
            self._set_pace(flight.peer, after_busy(self._pace(flight.peer), in_flight))
        if isinstance(error, PeerTimeout):
            self._set_pace(flight.peer, after_timeout(self._pace(flight.peer), now))
        self.trouble(flight.item, error, now, chunk=1 << flight.next)

    def trouble(self, key: ItemKey, error: PeerError, now: float, *, chunk: Bits = 0) -> None:
        """Something went wrong with a peer while it was asked about an object, perhaps for `chunk`."""
        self.due = True
        peer = PeerId(error.peer)
        self._asking.discard((peer, key))
        self.note(key, error)
        item = self._items.get(key)
        if not isinstance(error, PeerRefused) or error.code is not RefusalCode.NOT_HELD:
            self.blame(error)
        elif item is not None:
            item.claims[peer], lied = after_refusal(item.claims.get(peer, Claim()), chunk, now)
            if lied:
                self.blame(FalseClaim(f"claims again what it refuses: {error.reason}", peer=peer))

    def note(self, key: ItemKey, error: PeerError) -> None:
        """Remember what was wrong with a peer, to be told if nobody can supply the object."""
        if item := self._items.get(key):
            item.reasons[PeerId(error.peer)] = error.reason

    def blame(self, error: PeerError) -> None:
        """Count an error against its peer; whose connection is of no use any more is given up."""
        self.due = True
        peer, offence = PeerId(error.peer), offence_of(error)
        self.counters.wrong += isinstance(error, IntegrityError)
        (self._standings if offence is Offence.LIE else self._pauses).blame(error)
        if offence is Offence.LIE or isinstance(error, PeerUnreachable):
            self._give_up(peer)

    # --- deciding -------------------------------------------------------------------------------------------------

    def steps(self, now: float) -> Steps:
        """What is to be done now."""
        self.due = False
        for peer in [peer for peer in self._peers if self._standings.banned(peer)]:
            self._give_up(peer)
        decided = plan(self._facts(now))
        self._apply_lateness(decided, now)
        for number in decided.cancel:
            self._take_back([self._flights[number]])
        start = tuple(self._start(ask, now) for ask in decided.ask)
        questions = tuple(self._ask_what_they_have(now))
        cancel, self._cancel = tuple(self._cancel), []
        close, self._close = tuple(self._close), []
        return Steps(start, cancel, close, questions, decided.stuck, min(decided.wake, self._ask_at()))

    def _facts(self, now: float) -> Facts:
        return Facts(
            now=now,
            items=tuple(
                Item(
                    key=item.key,
                    chunks=item.chunks,
                    missing=item.missing,
                    holders={peer: claim.have for peer, claim in item.claims.items() if peer in self._peers},
                    start=item.start,
                    urgent=item.urgent,
                )
                for item in self._items.values()
                if item.chunks
            ),
            peers=tuple(
                Peer(peer, self._pace(peer), self.ready_at(peer), last_resort)
                for peer, last_resort in self._peers.items()
            ),
            flights=tuple(self._flights.values()),
        )

    def _apply_lateness(self, decided: Plan, now: float) -> None:
        for peer in decided.late:
            pace = self._pace(peer)
            error = PeerTimeout(f"no chunk for {pace.timeout:.1f} s", peer=peer)
            for key in {flight.item for flight in self._flights_of(peer)}:
                self.note(key, error)
            self._take_back(self._flights_of(peer), excused=False)
            self._set_pace(peer, after_timeout(pace, now))
            self._pauses.blame(error)
            if peer in decided.stalled:
                self._give_up(peer)

    def _ask_what_they_have(self, now: float) -> Iterator[tuple[PeerId, ItemKey]]:
        for key, item in self._items.items():
            for peer, claim in item.claims.items() if item.chunks else ():
                due = claim.ask_at is not None and claim.ask_at <= now
                if due and peer in self._peers and self.ready_at(peer) <= now:
                    item.claims[peer] = replace(claim, ask_at=now + ASK_AGAIN)  # unless the answer says more
                    self._asking.add((peer, key))
                    yield peer, key

    def _ask_at(self) -> float:
        return min(
            (
                max(claim.ask_at, self.ready_at(peer))
                for item in self._items.values()
                for peer, claim in item.claims.items()
                if item.chunks
                if claim.ask_at is not None and peer in self._peers
            ),
            default=math.inf,
        )

    def _start(self, ask: Ask, now: float) -> Flight:
        self._last_number += 1
        idle = not self._flights_of(ask.peer)
        self._set_pace(ask.peer, after_asking(self._pace(ask.peer), now, idle=idle))
        flight = Flight(self._last_number, ask.peer, ask.item, ask.first, ask.first + ask.count, now)
        self._flights[flight.number] = flight
        return flight

    # --- parts ----------------------------------------------------------------------------------------------------

    def _flights_of(self, peer: PeerId) -> list[Flight]:
        return [flight for flight in self._flights.values() if flight.peer == peer]

    def _drop(self, flight: Flight, *, excused: bool = True) -> None:
        """A request is over; `excused`: not because its peer was silent."""
        del self._flights[flight.number]
        if excused and not self._flights_of(flight.peer):
            self._set_pace(flight.peer, after_release(self._pace(flight.peer)))

    def _take_back(self, flights: Iterable[Flight], *, excused: bool = True) -> None:
        for flight in flights:
            self._drop(flight, excused=excused)
            self._cancel.append(flight.number)

    def _give_up(self, peer: PeerId) -> None:
        if peer in self._peers:
            self.disconnected(peer)
            self._close.append(peer)

    def _pace(self, peer: PeerId) -> Pace:
        return self._paces.get(peer) or Pace()

    def _set_pace(self, peer: PeerId, pace: Pace) -> None:
        self._paces[peer] = pace
        self._paces.move_to_end(peer)
        if len(self._paces) > MAX_PACES + len(self._peers):
            oldest = next(other for other in self._paces if other not in self._peers)
            del self._paces[oldest]
