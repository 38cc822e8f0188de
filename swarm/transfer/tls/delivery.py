"""The second thread of a bulk connection: hands received chunks on, and ends the requests they belong to.

Everything that a request's owner learns of it comes from this one thread, in order: its chunks, then its end. So a
request that has ended, or whose withdrawal has gone through, gets no chunk any more.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.swarm.transfer.channel import Deliver
from moehive.swarm.transfer.replies import ExpectedChunks

T = TypeVar("T")
_BUFFERS = 3  # chunks: one that is received, one that is delivered, and one between them


@dataclass(eq=False, slots=True)
class ChunkRequest:
    """A request for chunks; `done` is settled on the event loop it belongs to."""

    done: asyncio.Future[None]
    deliver: Deliver
    expected: ExpectedChunks
    moved: float = field(default_factory=time.monotonic)  # when something was last received
    over: bool = False  # no chunk is to be delivered any more


@dataclass(frozen=True, slots=True)
class _Step:
    """A chunk (bytes of `buffer`), the end of its request, or both."""

    request: ChunkRequest
    index: int = 0
    buffer: memoryview | None = None
    size: int = 0
    end: bool = True
    error: Exception | None = None


class Delivery:
    """`run()` is the thread; the other methods may be called from any."""

    def __init__(self) -> None:
        self._steps: SimpleQueue[_Step | None] = SimpleQueue()
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(CHUNK_SIZE)))
        self._delivering = False
        self._delivered = 0.0

    @property
    def moved(self) -> float:
        """When a delivery last ended; now, while one is going on: a slow disk is not the peer's fault."""
        return time.monotonic() if self._delivering else self._delivered

    def take_buffer(self) -> memoryview:
        """One of `CHUNK_SIZE` bytes; waits while all are on their way. It goes back with `give_back` or `chunk`."""
        return self._free.get()

    def give_back(self, buffer: memoryview) -> None:
        """A buffer whose contents nobody wants."""
        self._free.put(buffer)

    def chunk(self, request: ChunkRequest, index: int, buffer: memoryview, size: int, *, last: bool) -> None:
        """Deliver the first `size` bytes of `buffer` as chunk `index`."""
        self._steps.put(_Step(request, index, buffer, size, end=last))

    def end(self, request: ChunkRequest, error: Exception | None = None) -> None:
        """End a request, after what was put before."""
        self._steps.put(_Step(request, error=error))

    def withdraw(self, request: ChunkRequest) -> None:
        """End a request as soon as may be: what waits is not delivered."""
        request.over = True
        self.end(request)

    def stop(self) -> None:
        """End the thread, after what was put before."""
        self._steps.put(None)

    def run(self) -> None:
        """Until `stop`."""
        while (step := self._steps.get()) is not None:
            error = step.error
            if step.buffer is not None:
                error = self._deliver(step, step.buffer)
                self._free.put(step.buffer)
            if step.end or error is not None:
                step.request.over = True
                _settle(step.request.done, error)

    def _deliver(self, step: _Step, buffer: memoryview) -> Exception | None:
        if step.request.over:
            return None
        self._delivering = True
        try:
            step.request.deliver(step.index, buffer[: step.size])
        except Exception as error:  # noqa: BLE001 - it is the caller's, and raised where the caller waits
            return error
        finally:
            self._delivered = time.monotonic()
            self._delivering = False
        return None


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    with suppress(RuntimeError):  # the event loop is closed: nobody waits
        future.get_loop().call_soon_threadsafe(settle, future, None, error)


def settle(future: asyncio.Future[T], result: T, error: Exception | None) -> None:
    """On the event loop: the result or the error, unless there is one already."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # its owner may have gone
