"""The uploads of one node, whichever carrier they leave by: turns, the rate, and the way they make for activations.

Serving threads and coroutines ask for a turn, send one answer, and give the turn back. The decisions are those of
`policy.upload` and `policy.priority`; this keeps the books for them, under one lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import Chunk
from moehive.swarm.log import get_logger
from moehive.swarm.policy.priority import INTERVAL, Interval, Priority, Sample, decide
from moehive.swarm.policy.upload import (
    Bucket,
    Running,
    UploadLimits,
    draw,
    find_place,
    next_turn,
    retry_after,
    slots_at,
)
from moehive.swarm.rpc.server import Refusal

from .supply import Answer

T = TypeVar("T")
PIECE = 64 << 10  # bytes that leave at once where the rate is limited: what a small message may have to wait for
SHARED_RATE = 50e6  # bytes per second to peers on whose connection activations wait
MIN_PAUSE = 0.001  # seconds; shorter ones cost more than they bring, and add up to longer ones
ACTIVE = 10.0  # seconds after a peer's last expert request in which its next one is expected
_MAX_SAMPLES = 1024
_MAX_REMEMBERED = 1024  # peers whose last turn is known
_SMOOTHING = 0.1
_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Turn:
    """A place in the queue, then one of the slots. `granted` is done when it may be used; Refusal is set where not."""

    peer: PeerId
    granted: Future[None] = field(default_factory=Future)
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class UploadFacts:
    """Uploads at one moment."""

    bytes_sent: int
    running: int
    waiting: int
    rate: float | None  # bytes per second that may leave; None: as many as can
    asking: int  # peers that asked for experts just now


class Uploads:
    """Thread-safe. `run()` belongs on the event loop: it decides about the rate, and moves slow uploads out of the way.

    Args:
        limits: see UploadLimits.
        rate: bytes per second that all uploads together may use; None for as many as they can.
        clock: seconds.
    """

    def __init__(
        self,
        limits: UploadLimits | None = None,
        *,
        rate: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or UploadLimits()
        self.bytes_sent = 0  # of objects
        self._paid = 0  # bytes, frames and all
        self.cap = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[Turn] = deque()
        self._running: list[Turn] = []
        self._turns: OrderedDict[PeerId, int] = OrderedDict()  # the number of each peer's last turn
        self._count = 0
        self._seconds_each = 0.1  # smoothed
        self._bucket = Bucket()
        self._shared_bucket = Bucket()
        self._priority = Priority()
        self._samples: deque[Sample] = deque(maxlen=_MAX_SAMPLES)
        self._active: OrderedDict[PeerId, float] = OrderedDict()  # when each peer last asked for experts

    @property
    def facts(self) -> UploadFacts:
        """A snapshot."""
        with self._lock:
            now = self._clock()
            asking = sum(now - asked < ACTIVE for asked in self._active.values())
            return UploadFacts(self.bytes_sent, len(self._running), len(self._waiting), self.rate, asking)

    # --- turns ----------------------------------------------------------------------------------------------------

    def ask(self, peer: PeerId) -> Turn:
        """A turn for one answer to `peer`, now or later; give it back with `end`. Raises Refusal when too many wait."""
        with self._lock:
            waiting = [turn.peer for turn in self._waiting]
            place = find_place(waiting, peer, self.limits)
            if place.refused:
                raise self._busy()
            if place.displaces is not None:
                displaced = self._waiting[place.displaces]
                del self._waiting[place.displaces]
                self._resolve(displaced, self._busy())
            turn = Turn(peer)
            self._waiting.append(turn)
            self._grant()
            return turn

    @asynccontextmanager
    async def turn(self, peer: PeerId) -> AsyncIterator[None]:
        """`ask`, wait, and `end`, for coroutines. Raises Refusal."""
        turn = self.ask(peer)
        try:
            if not turn.granted.done():
                await asyncio.wrap_future(turn.granted)
            turn.granted.result()  # which is there: no way through the event loop, for every chunk that need not wait
            yield
        finally:
            self.end(turn)

    def end(self, turn: Turn) -> None:
        """Give a turn back, whether it was granted or not."""
        with self._lock:
            if turn in self._running:
                self._running.remove(turn)
                self._seconds_each += _SMOOTHING * (self._clock() - turn.since - self._seconds_each)
            else:
                with suppress(ValueError):  # refused meanwhile
                    self._waiting.remove(turn)
            self._grant()

    @property
    def contended(self) -> bool:
        """Whether somebody waits for a turn."""
        return bool(self._waiting)

    def _grant(self) -> None:
        """Inside the lock."""
        while True:
            now = self._clock()
            running = [Running(turn.peer, turn.since) for turn in self._running]
            limits = slots_at(self.rate, self.limits)
            index = next_turn([turn.peer for turn in self._waiting], running, self._turns, limits, now)
            if index is None:
                return
            turn = self._waiting[index]
            del self._waiting[index]
            if self._resolve(turn, None):
                turn.since = now
                self._running.append(turn)
                self._count += 1
                _remember(self._turns, turn.peer, self._count)

    def _busy(self) -> Refusal:
        seconds = retry_after(len(self._waiting) + 1, self._seconds_each, self.limits)
        return Refusal(RefusalCode.BUSY, f"{len(self._waiting)} requests are waiting", retry_after=seconds)

    @staticmethod
    def _resolve(turn: Turn, error: Refusal | None) -> bool:
        """False where nobody waits for it any more."""
        if not turn.granted.set_running_or_notify_cancel():
            return False
        if error is None:
            turn.granted.set_result(None)
        else:
            turn.granted.set_exception(error)
        return True

    # --- rate -----------------------------------------------------------------------------------------------------

    @property
    def rate(self) -> float | None:
        """Bytes per second that may leave now; None for as many as can."""
        limits = [limit for limit in (self.cap, self._priority.allowed) if limit is not None]
        return min(limits, default=None)

    def sent(self, answer: Answer) -> None:
        """Count what has left."""
        if isinstance(answer.message, Chunk):
            with self._lock:
                self.bytes_sent += len(answer.payload)

    def pay(self, size: int) -> float:
        """Ask to send `size` bytes on a connection of their own: the seconds to wait before."""
        return self._pay(size, shared=False)

    def pay_beside(self, peer: PeerId, size: int) -> float:
        """`pay`, on a connection that also carries the activations of `peer`: slower, while there are any."""
        return self._pay(size, shared=self.beside(peer))

    def beside(self, peer: PeerId) -> bool:
        """Whether `peer` has asked for experts just now."""
        asked = self._active.get(peer)
        return asked is not None and self._clock() - asked < ACTIVE

    def _pay(self, size: int, *, shared: bool) -> float:
        with self._lock:
            self._paid += size
            now, wait, rate = self._clock(), 0.0, self.rate
            if rate is not None:
                self._bucket, wait = draw(self._bucket, size, rate, now)
            if shared:
                self._shared_bucket, beside = draw(self._shared_bucket, size, SHARED_RATE, now)
                wait = max(wait, beside)
            return wait if wait >= MIN_PAUSE else 0.0

    # --- activations, on the event loop ---------------------------------------------------------------------------

    def asked(self, peer: PeerId) -> None:
        """An expert request has arrived: bulk makes way for its answer, and for those that follow."""
        _remember(self._active, peer, self._clock())

    def served(self, rows: int, seconds: float) -> None:
        """It was answered."""
        self._samples.append(Sample(self._clock(), rows, seconds))

    async def run(self) -> None:
        """Decide, once in each interval, for ever."""
        before, paid_before = self._clock(), self._paid
        while True:
            await asyncio.sleep(INTERVAL)
            now, paid = self._clock(), self._paid
            self.decide(Interval(now, tuple(self._samples), (paid - paid_before) / max(now - before, INTERVAL)))
            before, paid_before = now, paid

    def decide(self, facts: Interval) -> None:
        """One round of `run`."""
        old = self._priority.limit
        with self._lock:
            self._priority = decide(self._priority, facts)
            self._grant()  # uploads may have become slow
        if (old is None) is not (self._priority.limit is None):
            _log.info("uploads make way for activations" if old is None else "uploads run freely again")


def _remember(values: OrderedDict[PeerId, T], peer: PeerId, value: T) -> None:
    """Keep the latest value of each of so many peers."""
    values[peer] = value
    values.move_to_end(peer)
    if len(values) > _MAX_REMEMBERED:
        values.popitem(last=False)
