"""The compute worker: one thread that computes, fed by a bounded queue of requests.

Requests wait in the queue only while the thread is busy, or a moment for others that are about to come (`gathering`);
when it is free it takes all that fit together. A batch of large requests is computed a slice at a time, with a batch of
small ones in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from moehive.kernels.expert_ffn import FfnSpec
from moehive.protocol.errors import LocalError, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import RunExperts
from moehive.swarm.log import get_logger
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.rpc.server import Refusal
from moehive.swarm.telemetry.histogram import Histogram

from . import gathering
from .compute import BatchRun, LeaseExpert, NoteUses, Work
from .scheduler import QueueFacts, QueueLimits, admit, arrived, computed, next_batch
from .waiting import Queued, RequestQueue, Result

_SMOOTHING = 0.2
_log = get_logger(__name__)


class _Batch:
    """What is being computed."""

    def __init__(self, requests: Sequence[Queued], run: BatchRun, started: float) -> None:
        self.requests = requests
        self.run = run
        self.started = started
        self.slice_started: float | None = None  # of the slice that is being computed
        self.seconds = 0.0  # of the thread for the slices before
        self.rows = sum(queued.waiting.rows for queued in requests)

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return any(not queued.done.done() for queued in self.requests)

    def rows_left(self, now: float, seconds_per_row: float) -> int:
        """Rows that are not computed yet, by the time that has been spent: who arrives now waits for no more."""
        spent = self.seconds + (0.0 if self.slice_started is None else now - self.slice_started)
        return max(self.rows - int(spent / seconds_per_row), 0) if seconds_per_row else self.rows


class ComputeWorker:
    """Computes requests for one model. `run()` works until cancelled; `submit` may be called on its event loop."""

    def __init__(
        self,
        lease: LeaseExpert,
        spec: FfnSpec,
        limits: QueueLimits,
        *,
        note: NoteUses | None = None,
        device: DeviceExperts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease = lease
        self._note = note
        self._device = device
        self._spec = spec
        self._limits = limits
        self._clock = clock
        self._queue = RequestQueue()
        self._served: dict[Hashable, float] = {}  # rows, of clients that wait or waited a moment ago
        self._wake = asyncio.Event()
        self._seconds_per_row = 0.0
        self._gathering = gathering.Gathering()
        self._computing: list[_Batch] = []  # at most a small one and a large one that waits for its next slice
        self.rows_done = 0
        self.batches_done = 0
        self.requests_done = 0
        self._latency = Histogram()  # from a request's arrival to its answer

    @property
    def latencies(self) -> Histogram:
        """Of the requests that were answered, from arrival to answer, the network apart: a snapshot."""
        return self._latency.copy()

    @property
    def facts(self) -> QueueFacts:
        """How full the queue is, with what is left of what is being computed."""
        return self._facts()

    def _facts(self, client: PeerId | None = None) -> QueueFacts:
        facts = self._queue.facts(client, self._seconds_per_row)
        now = self._clock()
        for batch in self._computing:
            rows = batch.rows_left(now, self._seconds_per_row)
            small_rows = rows if batch.requests[0].waiting.small else 0
            facts = replace(facts, rows=facts.rows + rows, small_rows=facts.small_rows + small_rows)
        return facts

    def refusal(self, message: RunExperts, payload_bytes: int, client: PeerId) -> Refusal | None:
        """Why a request that has just arrived would not be queued, and when to come back; None where it would be."""
        facts, small = self._facts(client), self._is_small(message)
        refuse = admit(facts, self._limits, payload_bytes=payload_bytes, deadline=message.deadline, small=small)
        if refuse is None:
            return None
        return Refusal(refuse.code, f"{facts.requests} requests are waiting", retry_after=refuse.retry_after)

    async def submit(self, work: Work, payload_bytes: int, client: PeerId) -> Result:
        """Queue a request and wait for its answer. Raises Refusal when it is not queued, LocalError when it fails."""
        refusal = self.refusal(work.message, payload_bytes, client)
        if refusal is not None:
            raise refusal
        self._served = arrived(self._served, client, self._queue.clients)
        queued = Queued.begin(work, client, payload_bytes, self._clock(), small=self._is_small(work.message))
        self._queue.add(queued)
        self._wake.set()
        return await queued.done  # a caller that goes away cancels the future; the batch then leaves it out

    def _is_small(self, message: RunExperts) -> bool:
        return message.tokens <= self._limits.small_tokens

    async def run(self) -> None:
        """Compute for ever."""
        large: _Batch | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="compute") as thread:
            while True:
                if large is None:
                    await self._gather()
                small = self._take(small=True)
                large = large or self._take(small=False)
                if small is None and large is None:
                    self._wake.clear()
                    await self._wake.wait()
                if small is not None:
                    await self._advance(thread, small)  # whole: small batches have one slice
                if large is not None and await self._advance(thread, large):
                    large = None

    async def _gather(self) -> None:
        """Let a few small requests wait for those that are about to come."""
        queue = self._queue
        seconds = gathering.patience(self._gathering, queue.small, self._clock())
        if not (seconds and queue.only_small()):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while queue.only_small() and queue.small < self._gathering.in_flight:
                    self._wake.clear()
                    await self._wake.wait()
        self._gathering = gathering.gathered(self._gathering, queue.small)

    def _take(self, *, small: bool) -> _Batch | None:
        if not self._queue.clients:
            return None
        for queued in self._queue.late(self._clock()):
            queued.done.set_exception(Refusal(RefusalCode.DEADLINE, "waited past the request's deadline"))
        requests = self._queue.take(next_batch(self._queue.waiting, self._limits, self._served, small=small))
        if not requests:
            return None
        self._served = computed(self._served, [queued.waiting for queued in requests], self._queue.clients)
        slice_rows = self._limits.batch_rows if small else self._limits.slice_rows
        works = [queued.work for queued in requests]
        run = BatchRun(works, self._lease, self._spec, slice_rows=slice_rows, note=self._note, device=self._device)
        batch = _Batch(requests, run, self._clock())
        self._computing.append(batch)
        return batch

    async def _advance(self, thread: ThreadPoolExecutor, batch: _Batch) -> bool:
        """Compute a batch's next slice; whether the batch is over, answered or failed."""
        batch.slice_started = self._clock()
        try:
            over = not batch.wanted or await asyncio.get_running_loop().run_in_executor(thread, batch.run.advance)
        except LocalError as error:
            self._fail(batch.requests, error)
            over = True
        except Exception:  # noqa: BLE001 - supervision point: one batch must not end the worker
            first = batch.requests[0].work.message
            _log.exception("a batch failed: a bug", layer=first.layer, requests=len(batch.requests))
            self._fail(batch.requests, LocalError("the computation failed"))
            over = True
        batch.seconds += self._clock() - batch.slice_started
        batch.slice_started = None
        if over:
            self._computing.remove(batch)
            if batch.wanted:
                self._answer(batch)
        return over

    def _answer(self, batch: _Batch) -> None:
        self._count(len(batch.requests), batch.rows, batch.seconds)
        if batch.requests[0].waiting.small:
            self._gathering = gathering.answered(
                self._gathering,
                requests=len(batch.requests),
                waiting=self._queue.small,
                seconds=batch.seconds,
                now=self._clock(),
            )
        for queued, output in zip(batch.requests, batch.run.outputs, strict=True):
            if not queued.done.done():
                self._latency.add(self._clock() - queued.since)
                queued.done.set_result(Result(output, batch.started - queued.since, batch.seconds))

    def _fail(self, batch: Sequence[Queued], error: LocalError) -> None:
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
