"""The layers whose keys and values are whole in memory: the one that attention reads, and with a second slot the next.

A slot's content is valid until the next layer asks for its own: attention of one layer is over when the next one
begins. That is what makes one slot enough for any number of layers, and why nobody may keep what a cache returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from moehive.protocol.errors import StorageError

from .memory import BufferPool


@dataclass(frozen=True, slots=True)
class Wanted:
    """What attention of a layer is about to read: `length` stored tokens in the places they have among `total`."""

    layer: int
    length: int
    total: int


_MEMORY: Final = 8  # fills over which their usual time is averaged

Fill: TypeAlias = Callable[[Wanted, Tensor], None]


@dataclass(slots=True)
class _Slot:
    buffer: Tensor | None = None
    holds: Wanted | None = None  # wholly fetched, and not asked for yet


@dataclass(frozen=True, slots=True)
class _Fetch:
    slot: _Slot
    wanted: Wanted
    done: Future[None]


@dataclass(slots=True)
class WorkspaceTimes:
    """Seconds, and how often what was fetched in advance was what came next."""

    reload: float = 0.0  # putting layers together, in either thread
    wait: float = 0.0  # the part of it that computation waited for
    expected: int = 0
    unexpected: int = 0


class Workspace:
    """One slot, or two and a thread. `fill` puts a layer's stored tokens together; it runs in either thread."""

    def __init__(self, pool: BufferPool) -> None:
        self.times = WorkspaceTimes()
        self.worthwhile = 1e-3  # seconds that a fill takes before handing it to another thread pays
        self._pool = pool
        self._nbytes = 0
        self._slots: list[_Slot] = []
        self._current = 0
        self._pending: _Fetch | None = None
        self._usual = 0.0  # seconds of a fill
        self._thread: ThreadPoolExecutor | None = None

    @property
    def capacity(self) -> int:
        """Bytes of a slot."""
        return self._nbytes

    @property
    def looks_ahead(self) -> bool:
        """Whether there is a slot for the next layer, and fetching takes long enough to be done meanwhile."""
        return len(self._slots) > 1 and self._usual > self.worthwhile

    def resize(self, slots: int, nbytes: int) -> None:
        """So many slots of so many bytes, with nothing in them."""
        self.settle()
        for slot in self._slots:
            if slot.buffer is not None:
                self._pool.free(slot.buffer)
        self._slots = [_Slot() for _ in range(slots)]
        self._current, self._nbytes = 0, nbytes

    def settle(self) -> None:
        """Wait until nothing is being fetched. Whoever changes what is stored does this first."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        started = time.perf_counter()
        try:
            pending.done.result()
            pending.slot.holds = pending.wanted
        except StorageError:
            pass  # its layer is put together again when it is asked for, which meets the same error
        finally:
            self.times.wait += time.perf_counter() - started

    def open(self, wanted: Wanted, fill: Fill) -> Tensor:
        """A slot's buffer with the stored tokens in place. Raises what `fill` raises."""
        self.settle()
        slot = self._slots[self._other]
        expected, slot.holds = slot.holds == wanted, None
        buffer = self._buffer(slot)
        if expected:
            self.times.expected += 1
        elif wanted.length:
            self.times.unexpected += 1
            started = time.perf_counter()
            self._fill(buffer, wanted, fill)
            self.times.wait += time.perf_counter() - started
        self._current = self._other
        return buffer

    def fetch_ahead(self, wanted: Wanted, fill: Fill) -> None:
        """Start to put together what is probably asked for next, while the caller computes."""
        assert self._pending is None
        assert self.looks_ahead
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="moehive-kv")
        slot = self._slots[self._other]
        slot.holds = None
        buffer = self._buffer(slot)  # here: in the other thread nothing is allocated
        done = self._thread.submit(_on_stream_of(self._pool.device), self._fill, buffer, wanted, fill)
        self._pending = _Fetch(slot, wanted, done)

    def forget(self, layer: int) -> None:
        """What was fetched of a layer is no longer what it stores."""
        self.settle()
        for slot in self._slots:
            if slot.holds is not None and slot.holds.layer == layer:
                slot.holds = None

    def close(self) -> None:
        """Free the slots and end the thread."""
        self.resize(0, 0)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    @property
    def _other(self) -> int:
        """The slot that attention does not read now; the only one if there is one, which it has read."""
        return (self._current + 1) % len(self._slots)

    def _buffer(self, slot: _Slot) -> Tensor:
        if slot.buffer is None:
            slot.buffer = self._pool.take(self._nbytes)
        return slot.buffer

    def _fill(self, buffer: Tensor, wanted: Wanted, fill: Fill) -> None:
        started = time.perf_counter()
        fill(wanted, buffer)
        seconds = time.perf_counter() - started
        self.times.reload += seconds
        self._usual += (seconds - self._usual) / _MEMORY


def _on_stream_of(device: torch.device) -> Callable[..., None]:
    """Calls a function on the stream of this thread, so that what it copies comes after what reads the slot now."""
    if device.type != "cuda":
        return _call
    stream = torch.cuda.current_stream(device)

    def call(function: Callable[..., None], *arguments: object) -> None:
        with torch.cuda.stream(stream):
            function(*arguments)

    return call


def _call(function: Callable[..., None], *arguments: object) -> None:
    function(*arguments)
