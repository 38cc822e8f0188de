"""Downloads in virtual time: the real bookkeeping and the real plans, with peers that follow a script.

Everything but the network is what runs in production (`transfer.traffic`, `policy.download`, the standings). A peer is
a queue that sends one chunk after the other at its rate; requests and chunks take half a round trip each. The same
scripts and the same seed give the same history.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moehive.protocol.bits import from_indices, full
from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.errors import (
    IntegrityError,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    RefusalCode,
)
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.policy.expectation import Flight, ItemKey
from moehive.swarm.standings import Standings
from moehive.swarm.transfer.traffic import Traffic

MB = 1e6
NEVER = float("inf")
LOOK_FOR_PEERS = 0.25  # seconds between attempts to connect while somebody is needed
MAX_EVENTS = 200_000


@dataclass(frozen=True)
class Script:
    """What one peer does. Times are seconds from the start."""

    rate: float = 50 * MB  # bytes per second
    rtt: float = 0.01
    have: frozenset[int] | None = None  # chunks; None: all
    claims: frozenset[int] | None = None  # what it says that it has, where that is something else
    appears: float = 0.0
    stalls: tuple[float, float] = (NEVER, NEVER)  # sends nothing meanwhile; what it is asked for waits
    dies: float = NEVER
    wrong: frozenset[int] = frozenset()  # chunks of which it sends other bytes
    slots: int = 64  # requests at a time; further ones are refused as busy
    last_resort: bool = False

    def has(self, index: int) -> bool:
        return self.have is None or index in self.have

    @property
    def said(self) -> frozenset[int] | None:
        return self.have if self.claims is None else self.claims


@dataclass
class Outcome:
    """What happened."""

    time: float = NEVER  # when everything was there
    sent: Counter[str] = field(default_factory=Counter)  # bytes that each peer put on the wire, the last chunk whole
    wrong: int = 0  # bytes of those that were not what was asked for
    wasted: int = 0  # bytes of the others that nobody needed
    duplicates_asked: int = 0  # chunks
    deepest: Counter[str] = field(default_factory=Counter)  # most chunks that a peer was asked for at once
    two_owners_early: int = 0  # requests for chunks under way from a peer that had others, which had no owner
    first_chunk: int = -1  # what was asked for first
    longest_run: int = 0  # chunks of one request
    asked_after_ban: int = 0
    steps: int = 0
    finished: dict[str, float] = field(default_factory=dict)  # when each object was complete

    @property
    def complete(self) -> bool:
        return self.time < NEVER


@dataclass
class _Server:
    """A peer's state."""

    id: PeerId
    script: Script
    connected: bool = False
    queue: deque[tuple[Flight, int]] = field(default_factory=deque)
    sending: bool = False
    generation: int = 0  # of its connections


class Simulation:
    """One download of some objects by one peer. Run it once."""

    def __init__(
        self,
        scripts: Mapping[str, Script],
        objects: Sequence[int] = (80,),
        *,
        seed: str = "seed",
        at_once: int = 16,
        missing: Mapping[int, frozenset[int]] | None = None,
    ) -> None:
        self.now = 1000.0
        self._start = self.now
        self.outcome = Outcome()
        self.standings = Standings(lambda: self.now)
        self.traffic = Traffic(self.standings, Standings(lambda: self.now), seed=seed)
        self._servers = {PeerId(name): _Server(PeerId(name), script) for name, script in scripts.items()}
        self._objects = {ItemKey(f"object {number}"): count for number, count in enumerate(objects)}
        self._waiting = deque(self._objects)
        self._open: set[ItemKey] = set()
        self._at_once = at_once
        self._flights: dict[int, Flight] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wake = NEVER
        self._cancelled: set[int] = set()

    def run(self, limit: float = 3600.0) -> Outcome:
        """Until everything is there, or `limit` virtual seconds have passed."""
        for server in self._servers.values():
            self._at(self._start + server.script.dies, lambda server=server: self._die(server))
            self._at(self._start + server.script.stalls[1], lambda server=server: self._send_next(server))
        self._begin_objects()
        self._look_for_peers()
        self._decide()
        events = 0
        while self._events and self.outcome.time == NEVER and self._events[0][0] <= self._start + limit:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            self._decide()
            events += 1
            assert events < MAX_EVENTS, "it does not end"
        received = self.traffic.counters.received
        self.outcome.wasted = sum(self.outcome.sent.values()) - self.outcome.wrong - received
        return self.outcome

    # --- what happens -----------------------------------------------------------------------------------------------

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        if time < NEVER:
            heapq.heappush(self._events, (max(time, self.now), next(self._order), happen))

    def _begin_objects(self) -> None:
        while self._waiting and len(self._open) < self._at_once:
            key = self._waiting.popleft()
            self._open.add(key)
            self.traffic.begin(key)
            self.traffic.open(key, self._objects[key], full(self._objects[key]))
            for server in self._servers.values():
                if server.connected:
                    self._offer(server, key)

    def _look_for_peers(self) -> None:
        """What the engine does besides: connect to whoever is there and not paused."""
        for server in self._servers.values():
            appeared = self._start + server.script.appears <= self.now < self._start + server.script.dies
            if appeared and not server.connected and self.traffic.ready_at(server.id) <= self.now:
                server.connected = True
                server.generation += 1
                self._at(self.now + server.script.rtt, lambda server=server: self._connected(server))
        self._at(self.now + LOOK_FOR_PEERS, self._look_for_peers)

    def _connected(self, server: _Server) -> None:
        if not server.connected or self._silent(server):
            return
        self.traffic.connected(server.id, last_resort=server.script.last_resort)
        self.traffic.answered(server.id, server.script.rtt)
        for key in self._open:
            self._offer(server, key)

    def _offer(self, server: _Server, key: ItemKey) -> None:
        self.traffic.offers(server.id, key, self.now, partial=server.script.said is not None)

    def _claim(self, server: _Server, key: ItemKey) -> None:
        if not server.connected or self._silent(server):
            return
        said = server.script.said
        have = EVERYTHING if said is None else from_indices(said) & full(self._objects[key])
        self.traffic.claimed(server.id, key, have, self.now)

    def _die(self, server: _Server) -> None:
        flights = [flight for flight in self._flights.values() if flight.peer == server.id]
        server.queue.clear()
        server.connected = False
        for flight in flights:
            self._fail(flight, PeerUnreachable("gone", peer=server.id))
        self.traffic.disconnected(server.id)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        if not self.traffic.due and self.now < self._wake:
            return
        self.outcome.steps += 1
        steps = self.traffic.steps(self.now)
        for number in steps.cancel:
            self._cancelled.add(number)
            flight = self._flights.pop(number, None)
            if flight is None:  # it failed together with its connection
                continue
            server = self._servers[flight.peer]
            self._at(self.now + server.script.rtt / 2, lambda n=number, s=server: self._withdraw(s, n))
        for peer in steps.close:
            self._servers[peer].connected = False
            self._servers[peer].queue.clear()
        for peer, key in steps.questions:
            server = self._servers[peer]
            self._at(self.now + server.script.rtt, lambda s=server, k=key: self._claim(s, k))
        for flight in steps.start:
            self._check(flight)
            self._flights[flight.number] = flight
            server = self._servers[flight.peer]
            self._at(self.now + server.script.rtt / 2, lambda f=flight, s=server: self._arrive(s, f))
        self._wake = steps.wake
        self._at(steps.wake, lambda: None)

    def _check(self, flight: Flight) -> None:
        """Keep what properties are about."""
        outcome, others = self.outcome, [f for f in self._flights.values() if f.item == flight.item]
        raced = [other for other in others if other.bits & flight.bits]
        assert flight.peer not in {other.peer for other in raced}, "one peer is asked twice for a chunk"
        if raced:
            outcome.duplicates_asked += flight.count
            under_way = 0
            for other in others:
                under_way |= other.bits
            outcome.two_owners_early += bool(
                self.traffic.missing(flight.item) & ~under_way & self.traffic.have(flight.peer, flight.item)
            )
        if outcome.first_chunk < 0:
            outcome.first_chunk = flight.next
        outcome.longest_run = max(outcome.longest_run, flight.count)
        outcome.asked_after_ban += self.standings.banned(flight.peer)
        of_peer = sum(f.count for f in self._flights.values() if f.peer == flight.peer) + flight.count
        outcome.deepest[flight.peer] = max(outcome.deepest[flight.peer], of_peer)

    def _arrive(self, server: _Server, flight: Flight) -> None:
        if flight.number in self._cancelled or not server.connected:
            return
        if len({queued.number for queued, _ in server.queue}) >= server.script.slots:
            busy = PeerRefused(RefusalCode.BUSY, retry_after=0.2, peer=server.id)
            self._at(self.now + server.script.rtt / 2, lambda: self._fail(flight, busy))
            return
        server.queue.extend((flight, index) for index in range(flight.next, flight.stop))
        self._send_next(server)

    def _withdraw(self, server: _Server, number: int) -> None:
        keep = 1 if server.sending else 0  # what is on the wire goes out
        head = list(itertools.islice(server.queue, keep))
        server.queue = deque(head + [e for e in list(server.queue)[keep:] if e[0].number != number])

    def _silent(self, server: _Server) -> bool:
        begin, end = server.script.stalls
        return self._start + begin <= self.now < self._start + end

    def _send_next(self, server: _Server) -> None:
        if server.sending or not server.queue or not server.connected or self._silent(server):
            return
        flight, index = server.queue[0]
        if not server.script.has(index):
            server.queue = deque(entry for entry in server.queue if entry[0].number != flight.number)
            refused = PeerRefused(RefusalCode.NOT_HELD, peer=server.id)
            self._at(self.now + server.script.rtt / 2, lambda: self._fail(flight, refused))
            self._send_next(server)
            return
        server.sending = True
        self.outcome.sent[server.id] += CHUNK_SIZE
        self.outcome.wrong += CHUNK_SIZE * (index in server.script.wrong)
        generation = server.generation
        self._at(self.now + CHUNK_SIZE / server.script.rate, lambda: self._sent(server, flight, index, generation))

    def _sent(self, server: _Server, flight: Flight, index: int, generation: int) -> None:
        server.sending = False
        if not server.connected or generation != server.generation:
            self._send_next(server)
            return
        if server.queue and server.queue[0] == (flight, index):
            server.queue.popleft()
        self._at(self.now + server.script.rtt / 2, lambda: self._received(server, flight, index))
        self._send_next(server)

    def _received(self, server: _Server, flight: Flight, index: int) -> None:
        if flight.number not in self._flights:  # it was taken back
            return
        if index in server.script.wrong:
            self._fail(flight, IntegrityError("wrong chunk", peer=server.id))
            return
        self.traffic.chunk(flight.number, flight.item, index, CHUNK_SIZE, self.now)
        self._flights[flight.number] = replace(self._flights[flight.number], next=index + 1)
        if index + 1 == flight.stop:
            del self._flights[flight.number]
            self.traffic.finished(flight.number, self.now)
        if flight.item in self._open and not self.traffic.missing(flight.item):
            self._finish(flight.item)

    def _fail(self, flight: Flight, error: PeerUnreachable | PeerRefused | PeerTimeout | IntegrityError) -> None:
        if self._flights.pop(flight.number, None):
            self.traffic.failed(flight.number, error, self.now)

    def _finish(self, key: ItemKey) -> None:
        self._open.discard(key)
        self.traffic.end(key)
        self.outcome.finished[key] = self.now - self._start
        self._begin_objects()
        if not self._open:
            self.outcome.time = self.now - self._start


def simulate(scripts: Mapping[str, Script], objects: Sequence[int] = (80,), **options: object) -> Outcome:
    """Run a simulation to its end."""
    limit = float(options.pop("limit", 3600.0))  # type: ignore[arg-type]
    return Simulation(scripts, objects, **options).run(limit)  # type: ignore[arg-type]
