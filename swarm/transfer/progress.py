"""How far a download is, for whoever watches it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from moehive.protocol.ids import PeerId
from moehive.swarm.tasks import task_group

EVERY = 0.2  # seconds between two reports
_MEMORY = 2.0  # seconds over which the rate is taken


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """A moment of a download."""

    verified: int = 0  # bytes of the wanted objects that are verified, those found on disk included
    total: int = 0  # bytes wanted, as far as sizes are known
    done: int = 0  # objects that are complete
    objects: int = 0  # objects wanted
    rate: float = 0.0  # bytes per second, over the last moments
    peers: Mapping[PeerId, float] = field(default_factory=dict)  # who is sending now: bytes per second of each

    @property
    def eta(self) -> float | None:
        """Seconds until everything is there, if it goes on like this; None while nothing comes."""
        return max(self.total - self.verified, 0) / self.rate if self.rate else None


Observer = Callable[[TransferProgress], None]


class Meter:
    """Counts for one call; `reporting` calls the observer now and then, and at the end."""

    def __init__(self, observer: Observer | None, total: int, objects: int) -> None:
        self._observer = observer
        self._total = total
        self._objects = objects
        self._rate = 0.0
        self.verified = 0
        self.received = 0  # those of them that came from peers
        self.done = 0

    @asynccontextmanager
    async def reporting(self, peers: Callable[[], Mapping[PeerId, float]]) -> AsyncIterator[None]:
        """Report while the body runs. What the observer raises ends it."""
        if self._observer is None:
            yield
            return
        async with task_group() as tasks:
            ticking = tasks.create_task(self._tick(self._observer, peers), name="progress")
            yield
            ticking.cancel()
        self._observer(self._moment({}))

    async def _tick(self, observer: Observer, peers: Callable[[], Mapping[PeerId, float]]) -> None:
        before = self.received
        while True:
            await asyncio.sleep(EVERY)
            self._rate += (EVERY / _MEMORY) * ((self.received - before) / EVERY - self._rate)
            before = self.received
            observer(self._moment(peers()))

    def _moment(self, peers: Mapping[PeerId, float]) -> TransferProgress:
        total = max(self._total, self.verified)
        return TransferProgress(self.verified, total, self.done, self._objects, self._rate, peers)


class Share:
    """One object's part of a meter."""

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter = meter
        self._size = size
        self._counted = 0

    def received(self, size: int) -> None:
        """Bytes came and were verified."""
        self._meter.received += size
        self.found(size)

    def found(self, size: int) -> None:
        """Bytes are verified."""
        self._counted += size
        self._meter.verified += size

    def complete(self) -> None:
        """All of it is there, wherever it came from."""
        self.found(max(self._size - self._counted, 0))
        self._meter.done += 1
