"""Acts on the plans: sends requests, hands chunks to their sinks, asks peers what they have, and tells the bookkeeping.

One engine for all downloads of a process, so that a peer's channel, its pace and its depth are shared by all of them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from moehive.protocol.bits import Bits, from_indices
from moehive.protocol.errors import IntegrityError, LocalError, PeerError
from moehive.protocol.ids import PeerId, ShardHash
from moehive.swarm.log import get_logger
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.policy.expectation import Flight, ItemKey
from moehive.swarm.policy.pace import MAX_TIMEOUT
from moehive.swarm.standings import Standings
from moehive.swarm.store.base import WrongBytes

from .channel import ChunkChannel, Deliver, OpenChannel
from .channels import MAX_CHANNELS, Channels
from .sinks import Sink
from .sources import Source
from .traffic import Steps, Traffic

QUESTION_TIMEOUT = 5.0  # seconds in which a peer has to say what it has
IDLE = 60.0  # seconds without a download after which channels are closed
_LOOK = 0.25  # seconds between looks at the clock, which may have jumped
_log = get_logger(__name__)


@dataclass(eq=False)
class Job:
    """Chunks to be got into a sink."""

    key: ItemKey
    hash: ShardHash
    sink: Sink
    missing: Bits
    on_progress: Callable[[int], None]  # called with the bytes that have just been verified
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: BaseException) -> None:
        """End it with an error that is nobody else's."""
        if not self.done.done():
            self.done.set_exception(error)


class Engine:
    """An async context manager. Everything but the work of sinks happens on the event loop."""

    def __init__(
        self, open_channel: OpenChannel, standings: Standings, *, clock: Callable[[], float], seed: str
    ) -> None:
        self.traffic = Traffic(standings, Standings(clock), seed=seed)
        self.seed = seed
        self._clock = clock
        self._tasks = asyncio.TaskGroup()
        self._channels = Channels(open_channel, self._tasks, on_open=self._on_open, on_error=self.traffic.blame)
        self._jobs: dict[ItemKey, Job] = {}
        self._flights: dict[int, tuple[ItemKey, asyncio.Task[None]]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._listeners: dict[ItemKey, asyncio.Event] = {}  # whoever looks for sources of an object
        self._stuck: frozenset[ItemKey] = frozenset()
        self._changed = asyncio.Event()
        self._wake = math.inf

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._spawn(self._pump(), "downloads")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        self._channels.close_all()
        await self._tasks.__aexit__(None, None, None)  # without the body's error, which it would wrap into a group

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task that ends with the engine."""
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    # --- for downloads --------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds of the engine's clock."""
        return self._clock()

    def begin(self, key: ItemKey, *, urgent: bool) -> asyncio.Event:
        """An object is wanted. The event is set whenever it may be worth to look for sources, or to give up."""
        self.traffic.begin(key, urgent=urgent)
        self._listeners[key] = asyncio.Event()
        return self._listeners[key]

    def end(self, key: ItemKey) -> None:
        """It is not wanted any more. Comes after `work` has returned."""
        self.traffic.end(key)
        del self._listeners[key]

    async def connect(self, peer: PeerId, source: Source, key: ItemKey) -> ChunkChannel:
        """The channel to a peer, which is used for an object from now on. Raises PeerError."""
        channel = await self._channels.get(peer, source)
        self.traffic.offers(peer, key, self.now, partial=source.partial)
        self._may_go_on(key)
        return channel

    def is_connected(self, peer: PeerId) -> bool:
        """Whether there is a channel to a peer."""
        return peer in self._channels

    def is_stuck(self, key: ItemKey) -> bool:
        """Whether nothing is under way, nobody can be asked for anything now, and no answer is outstanding."""
        return key in self._stuck and not self.traffic.is_asking(key)

    def _may_go_on(self, key: ItemKey) -> None:
        """Somebody new may be asked for an object; if that is not so, the next steps say it again."""
        self._stuck -= {key}
        self._changed.set()

    async def work(self, job: Job) -> None:
        """Return when every chunk is in the sink; nothing is written to it afterwards. Raises LocalError."""
        self._jobs[job.key] = job
        self.traffic.open(job.key, len(job.sink.chunks.hashes), job.missing)
        self._changed.set()
        try:
            if job.missing:
                await job.done
        finally:
            del self._jobs[job.key]
            self.traffic.open(job.key, 0, 0)  # nothing more is asked for
            await self._cancel_flights(job.key)

    async def _cancel_flights(self, key: ItemKey) -> None:
        tasks = [task for of, task in self._flights.values() if of == key]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- acting ---------------------------------------------------------------------------------------------------

    async def _pump(self) -> None:
        """Take steps whenever something happened or the time has come."""
        while True:
            self._changed.clear()
            if self.traffic.due or self.now >= self._wake:
                self._act(self.traffic.steps(self.now))
            try:
                async with asyncio.timeout(max(0.0, min(self._wake - self.now, _LOOK)) if self._listeners else IDLE):
                    await self._changed.wait()
            except TimeoutError:
                if not self._listeners:
                    self._drop_channels(list(self._channels))

    def _act(self, steps: Steps) -> None:
        self._wake = steps.wake
        for number in steps.cancel:
            if number in self._flights:
                self._flights[number][1].cancel()
        for peer in steps.close:
            self._channels.close(peer)
        for flight in steps.start:
            flying = self._fly(flight, self._jobs[flight.item], self._channels[flight.peer])
            self._flights[flight.number] = flight.item, self._spawn(flying, f"chunks from {flight.peer}")
        for peer, key in steps.questions:
            asking = self._ask_what_it_has(peer, self._jobs[key], self._channels[peer])
            self._spawn(asking, f"have-map of {peer}")
        stuck, self._stuck = self._stuck, frozenset(steps.stuck)
        for key in self._listeners if steps.close else self._stuck - stuck:
            self._listeners[key].set()

    async def _fly(self, flight: Flight, job: Job, channel: ChunkChannel) -> None:
        deliver = self._deliver(flight, job)
        try:
            await channel.get_chunks(job.hash, flight.next, flight.count, deliver, timeout=MAX_TIMEOUT)
        except PeerError as error:
            self.traffic.failed(flight.number, error, self.now)
        except LocalError as error:
            job.fail(error)
        except Exception as error:  # noqa: BLE001 - supervision point: one object's bug must not end the others
            _log.exception("download failed: a bug", peer=flight.peer, object=job.hash)
            job.fail(error)
        else:
            self.traffic.finished(flight.number, self.now)
        finally:
            del self._flights[flight.number]
            self._changed.set()

    def _deliver(self, flight: Flight, job: Job) -> Deliver:
        """What the carrier calls with each chunk, in a thread of its own."""
        loop = asyncio.get_running_loop()

        def deliver(index: int, data: memoryview) -> None:
            try:
                job.sink.write_chunk(index, data)
            except WrongBytes as error:
                raise IntegrityError(f"chunk {index} of {job.hash} is wrong", peer=flight.peer) from error
            loop.call_soon_threadsafe(self._arrived, flight, job, index, len(data))

        return deliver

    def _arrived(self, flight: Flight, job: Job, index: int, size: int) -> None:
        if self.traffic.chunk(flight.number, job.key, index, size, self.now):
            job.on_progress(size)
        if self.traffic.due:
            self._changed.set()
        if job.key in self._jobs and not self.traffic.missing(job.key) and not job.done.done():
            job.done.set_result(None)

    async def _ask_what_it_has(self, peer: PeerId, job: Job, channel: ChunkChannel) -> None:
        asked = self.now
        try:
            have = await channel.have(job.hash, timeout=QUESTION_TIMEOUT)
        except PeerError as error:
            error.peer = error.peer or peer
            self.traffic.trouble(job.key, error, self.now)
        else:
            self.traffic.answered(peer, self.now - asked)
            self.traffic.claimed(peer, job.key, EVERYTHING if have is None else from_indices(have), self.now)
        self._may_go_on(job.key)

    # --- channels -------------------------------------------------------------------------------------------------

    def _on_open(self, peer: PeerId, source: Source) -> None:
        self.traffic.connected(peer, last_resort=source.last_resort)
        busy = self.traffic.sending()
        idle = [other for other in self._channels if other != peer and other not in busy]
        self._drop_channels(idle[: max(0, len(list(self._channels)) - MAX_CHANNELS)])
        self._changed.set()

    def _drop_channels(self, peers: list[PeerId]) -> None:
        for peer in peers:
            self.traffic.disconnected(peer)
            self._channels.close(peer)
