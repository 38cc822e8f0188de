"""Handing received chunks on, one after the other, and ending the requests they belong to.

Everything that a request's owner learns of it comes from here, in order: its chunks, then its end. So a request that
has ended, or whose withdrawal has gone through, gets no chunk any more.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from moehive.swarm.transfer.channel import Deliver
from moehive.swarm.transfer.replies import ExpectedChunks

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class ChunkRequest:
    """A request for chunks; `done` is settled on the event loop it belongs to."""

    done: asyncio.Future[None]
    deliver: Deliver
    expected: ExpectedChunks
    moved: float = field(default_factory=time.monotonic)  # when something was last received
    over: bool = False  # no chunk is to be delivered any more


@dataclass(frozen=True, slots=True)
class Step:
    """What came for a request: a chunk, its end, or both."""

    request: ChunkRequest
    index: int = 0
    data: memoryview | None = None
    end: bool = True
    error: Exception | None = None


class Delivery:
    """Thread-safe. Threads call `enter` in the order in which chunks arrived, and then `carry_out`, which leaves."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()  # of what follows, and of `over` of every request
        self._current: ChunkRequest | None = None  # to which a chunk is being delivered
        self._delivered = 0.0

    @property
    def moved(self) -> float:
        """When a delivery last ended; now, while one is going on: a slow disk is not the peer's fault."""
        return self._delivered if self._current is None else time.monotonic()

    def enter(self) -> None:
        """Wait until everything that came before is carried out."""
        self._turn.acquire()

    def leave(self) -> None:
        """Let the next one enter."""
        self._turn.release()

    def carry_out(self, step: Step) -> None:
        """Deliver the chunk, settle the request where it ends, and leave."""
        try:
            error = step.error or self._deliver(step)
            with self._lock:
                step.request.over = ended = step.end or error is not None or step.request.over
            if ended:
                _settle_soon(step.request.done, error)
        finally:
            self.leave()

    def withdraw(self, request: ChunkRequest) -> None:
        """End a request, on its event loop: at once, or else after the chunk that is being delivered to it."""
        with self._lock:
            request.over = True
            at_work = self._current is request
        if not at_work:
            settle(request.done, None, None)

    def _deliver(self, step: Step) -> Exception | None:
        with self._lock:
            if step.data is None or step.request.over:
                return None
            self._current = step.request
        try:
            step.request.deliver(step.index, step.data)
        except Exception as error:  # noqa: BLE001 - it is the caller's, and raised where the caller waits
            return error
        finally:
            self._delivered = time.monotonic()
            with self._lock:
                self._current = None
        return None


def _settle_soon(future: asyncio.Future[None], error: Exception | None) -> None:
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
