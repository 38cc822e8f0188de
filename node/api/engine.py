"""One model, one generation at a time, and a bounded queue in front of it: first come, first served.

transformers' `generate` is synchronous, so it runs in a thread of its own. Who asked waits on the event loop and may
give up at any time: a place in the queue is then free at once, the model after the token that it computes. Nobody who
reads slowly keeps the model waiting: text waits for its reader up to a bound, beyond which the generation is ended.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from moehive.protocol.errors import MoehiveError
from moehive.swarm.log import get_logger
from moehive.swarm.text.sampling import Sampling

from .counts import EngineCounts
from .errors import ApiError, of_failure
from .events import Usage

MAX_UNREAD: Final = 4096  # pieces of text that wait for a reader
_MAX_RETRY_AFTER: Final = 60  # seconds
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be generated."""

    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended."""

    reason: Literal["stop", "length", "halted"]
    usage: Usage


class Generate(Protocol):
    """Carries out work in a thread; `write` takes the text in pieces, `halted` is asked after each token."""

    def __call__(self, work: Work, write: Callable[[str], None], halted: Callable[[], bool]) -> Outcome:
        """Raises whatever a generation raises."""


class Job:
    """Work that was taken on. Made by `Engine.submit`; used on the event loop."""

    def __init__(self, work: Work, leave_queue: Callable[[Job], None], arrived: float) -> None:
        self.work = work
        self.arrived = arrived  # on the engine's clock
        self.spoke = False  # whether any text has come
        self.cancelled = False  # read by the thread that generates
        self._leave_queue = leave_queue
        self._items: asyncio.Queue[str | Outcome | ApiError] = asyncio.Queue()

    async def next(self) -> str | Outcome:
        """The next piece of text, or at last how it ended. Raises ApiError."""
        item = await self._items.get()
        if isinstance(item, ApiError):
            raise item
        return item

    def cancel(self) -> None:
        """Nobody wants the rest. May be called at any time, more than once."""
        self.cancelled = True
        self._leave_queue(self)

    def deliver(self, item: str | Outcome | ApiError) -> None:
        """For the engine."""
        if self._items.qsize() > MAX_UNREAD:
            return  # it was told
        if self._items.qsize() == MAX_UNREAD and isinstance(item, str):
            item = ApiError(408, "the answer was not read in time", kind="server_error", code="slow_reader")
            self.cancel()
        self._items.put_nowait(item)


class Engine:
    """`run()` works until cancelled. `waiting` jobs may wait besides the one that is worked on."""

    def __init__(self, generate: Generate, *, waiting: int = 16, clock: Callable[[], float] = time.monotonic) -> None:
        self._generate = generate
        self._most = waiting
        self._clock = clock
        self._queue: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._busy = False
        self._closed = False
        self._usual = 1.0  # seconds that a generation took lately
        self.counts = EngineCounts()

    @property
    def busy(self) -> bool:
        """Whether a job is worked on."""
        return self._busy

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    def check_room(self, more: int = 0) -> None:
        """Raises ApiError: 429 where too much waits already, `more` that are not submitted yet included, 503 after the
        end.
        """
        if self._closed:
            raise _closing()
        waiting = len(self._queue) + more
        if waiting >= self._most + (not self._busy):
            self.counts.refused += 1
            again = min(max(1, math.ceil(self._usual)), _MAX_RETRY_AFTER)
            raise ApiError(
                429,
                f"{waiting} requests are waiting already; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=again,
            )

    def submit(self, work: Work) -> Job:
        """Take on work. Raises ApiError, as `check_room`."""
        self.check_room()
        job = Job(work, self._remove, self._clock())
        self._queue.append(job)
        self._arrived.set()
        return job

    async def run(self) -> None:
        """Work on one job after the other. At the end the running one is halted after its token."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        try:
            while True:
                while not self._queue:
                    self._arrived.clear()
                    await self._arrived.wait()
                await self._work_on(self._queue.popleft(), thread)
        finally:
            self._closed = True
            for job in self._queue:
                job.deliver(_closing())
            thread.shutdown(wait=False)

    async def _work_on(self, job: Job, thread: ThreadPoolExecutor) -> None:
        started, self._busy = self._clock(), True
        running = asyncio.get_running_loop().run_in_executor(thread, self._carry_out, job, asyncio.get_running_loop())
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            job.cancel()
            await asyncio.wait([running])
            raise
        finally:
            self._busy = False
        self._usual += (self._clock() - started - self._usual) / 4

    def _carry_out(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread. The supervision point of generations: one that fails is told to who asked, and the next one
        begins.
        """

        def say(text: str) -> None:
            loop.call_soon_threadsafe(self._say, job, text)

        item: Outcome | ApiError
        try:
            item = self._generate(job.work, say, lambda: job.cancelled)
        except MoehiveError as error:
            _log.warning("a generation failed", reason=str(error))
            item = of_failure(error)
        except Exception as error:  # noqa: BLE001  # the supervision point
            _log.exception("a generation failed by our own fault")
            item = of_failure(error)
        loop.call_soon_threadsafe(self._end, job, item)

    def _say(self, job: Job, text: str) -> None:
        if not job.spoke:
            job.spoke = True
            self.counts.first.add(self._clock() - job.arrived)
        job.deliver(text)

    def _end(self, job: Job, item: Outcome | ApiError) -> None:
        self.counts.ended[item.reason if isinstance(item, Outcome) else "failed"] += 1
        if isinstance(item, Outcome):
            self.counts.used(item.usage)
        if isinstance(item, Outcome) and item.reason == "halted":
            item = _closing()  # who still reads did not ask for it
        else:
            self.counts.whole.add(self._clock() - job.arrived)
        job.deliver(item)

    def _remove(self, job: Job) -> None:
        if job in self._queue:
            self._queue.remove(job)


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down", retry_after=10)
