"""The compute worker: one thread that computes, fed by a bounded queue of requests.

Requests wait in the queue only while the thread is busy; when it is free it takes all that fit together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from moehive.kernels.expert_ffn import FfnSpec
from moehive.protocol.errors import LocalError, RefusalCode
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.server import Refusal

from .compute import LeaseExpert, Work, run_batch
from .scheduler import QueueFacts, QueueLimits, Waiting, admit, next_batch

_SMOOTHING = 0.2
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The answer to one request."""

    output: Tensor
    waited: float  # seconds in the queue
    computed: float  # seconds of the whole batch


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    work: Work
    payload_bytes: int
    since: float
    done: asyncio.Future[Result]

    @property
    def waiting(self) -> Waiting:
        message = self.work.message
        return Waiting((message.model, message.layer, message.dtype), message.rows)


class ComputeWorker:
    """Computes requests for one model. `run()` works until cancelled; `submit` may be called on its event loop."""

    def __init__(
        self,
        lease: LeaseExpert,
        spec: FfnSpec,
        limits: QueueLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease = lease
        self._spec = spec
        self._limits = limits
        self._clock = clock
        self._queue: list[_Queued] = []
        self._wake = asyncio.Event()
        self._seconds_per_row = 0.0
        self._computing_rows = 0
        self.rows_done = 0
        self.batches_done = 0
        self.requests_done = 0

    @property
    def facts(self) -> QueueFacts:
        """How full the queue is, what is being computed included."""
        return QueueFacts(
            requests=len(self._queue),
            queued_bytes=sum(queued.payload_bytes for queued in self._queue),
            rows=self._computing_rows + sum(queued.work.message.rows for queued in self._queue),
            seconds_per_row=self._seconds_per_row,
        )

    async def submit(self, work: Work, payload_bytes: int) -> Result:
        """Queue a request and wait for its answer. Raises Refusal when it is not queued, LocalError when it fails."""
        facts, deadline = self.facts, work.message.deadline
        refuse = admit(facts, self._limits, payload_bytes=payload_bytes, deadline=deadline)
        if refuse is not None:
            raise Refusal(refuse.code, f"{facts.requests} requests are waiting", retry_after=refuse.retry_after)
        queued = _Queued(work, payload_bytes, self._clock(), asyncio.get_running_loop().create_future())
        self._queue.append(queued)
        self._wake.set()
        return await queued.done  # a caller that goes away cancels the future; the batch then leaves it out

    async def run(self) -> None:
        """Compute for ever."""
        with ThreadPoolExecutor(1, thread_name_prefix="compute") as thread:
            while True:
                await self._wake.wait()
                batch = self._take()
                if batch:
                    await self._compute(thread, batch)
                else:
                    self._wake.clear()

    def _take(self) -> list[_Queued]:
        now = self._clock()
        for queued in self._queue:
            if now - queued.since > queued.work.message.deadline and not queued.done.done():
                queued.done.set_exception(Refusal(RefusalCode.DEADLINE, "waited past the request's deadline"))
        self._queue = [queued for queued in self._queue if not queued.done.done()]
        chosen = next_batch([queued.waiting for queued in self._queue], self._limits)
        batch = [self._queue[index] for index in chosen]
        for index in reversed(chosen):
            del self._queue[index]
        return batch

    async def _compute(self, thread: ThreadPoolExecutor, batch: Sequence[_Queued]) -> None:
        started = self._clock()
        rows = self._computing_rows = sum(queued.work.message.rows for queued in batch)
        work = [queued.work for queued in batch]
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(thread, run_batch, work, self._lease, self._spec)
        except LocalError as error:
            self._fail(batch, error)
            return
        except Exception:  # noqa: BLE001 - supervision point: one batch must not end the worker
            _log.exception("a batch failed: a bug", layer=batch[0].work.message.layer, requests=len(batch))
            self._fail(batch, LocalError("the computation failed"))
            return
        finally:
            self._computing_rows = 0
        seconds = self._clock() - started
        self._count(len(batch), rows, seconds)
        for queued, output in zip(batch, outputs, strict=True):
            if not queued.done.done():
                queued.done.set_result(Result(output, started - queued.since, seconds))

    def _fail(self, batch: Sequence[_Queued], error: LocalError) -> None:
        for queued in batch:
            if not queued.done.done():
                queued.done.set_exception(error)

    def _count(self, requests: int, rows: int, seconds: float) -> None:
        measured = seconds / rows
        known = self._seconds_per_row
        self._seconds_per_row = known + _SMOOTHING * (measured - known) if known else measured
        self.rows_done += rows
        self.requests_done += requests
        self.batches_done += 1
