"""An accelerator whose streams are queues that a test advances: nothing happens before its turn.

Memory starts as garbage. A copy that was ordered writes nothing until its stream is advanced to it, and a stream stands
before an event that has not come, as a GPU's do: who forgets to wait reads garbage.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GARBAGE = 0xA5
DEADLINE = 60.0  # seconds; reached only by a test that fails


class FakeEvent:
    def __init__(self, accelerator: FakeAccelerator) -> None:
        self._accelerator = accelerator
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._accelerator.reach(self)


Step = Callable[[], bool]  # whether it could be made


class FakeAccelerator:
    """`limit` is its memory in bytes. `eager`: what the caller's stream is told is done at once, as torch's processor
    does it; so telling it to wait makes the copies that it waits for, and nothing else does."""

    def __init__(self, limit: int = 1 << 40, *, eager: bool = False) -> None:
        self.device = torch.device("cpu")
        self.limit = limit
        self.allocated = self.staged = self.copies = self.refused = 0
        self.unfinished = 0  # copies that were ordered and not made
        self._eager = eager
        self._compute: deque[Step] = deque()
        self._copying: deque[Step] = deque()
        self._changed = threading.Condition(threading.RLock())
        self._mine = threading.get_ident()  # the thread that advances streams; others wait for it

    # --- Accelerator ----------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Tensor:
        if self.allocated + nbytes > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("no memory")
        self.allocated += nbytes
        with torch.inference_mode(False):
            return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def staging(self, nbytes: int) -> Tensor:
        self.staged += nbytes
        with torch.inference_mode(False):
            return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor, after: Sequence[FakeEvent]) -> FakeEvent:  # type: ignore[override]
        with self._changed:
            event = FakeEvent(self)
            for other in after:
                self._copying.append(lambda other=other: other.done)  # type: ignore[misc]

            def write() -> bool:
                target.copy_(source)
                self.unfinished -= 1
                return self._come(event)

            self._copying.append(write)
            self.copies += 1
            self.unfinished += 1
            self._changed.notify_all()
            return event

    def record(self) -> FakeEvent:
        with self._changed:
            event = FakeEvent(self)
            self._compute.append(lambda: self._come(event))
            self._when_eager()
            return event

    def wait(self, event: FakeEvent) -> None:  # type: ignore[override]
        with self._changed:
            self._compute.append(lambda: event.done)
            self._when_eager()

    # --- the test -------------------------------------------------------------------------------------------------

    def enqueue(self, kernel: Callable[[], None]) -> None:
        """A kernel on the caller's stream."""

        def run() -> bool:
            kernel()
            return True

        with self._changed:
            self._compute.append(run)

    def advance(self, *, copies: bool) -> bool:
        """Make one stream's next step; False where it stands or has none."""
        with self._changed:
            stream = self._copying if copies else self._compute
            if not stream or not stream[0]():
                return False
            stream.popleft()
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """Make all steps that can be made."""
        while self.advance(copies=True) or self.advance(copies=False):
            pass

    @property
    def idle(self) -> bool:
        return not self._compute and not self._copying

    def reach(self, event: FakeEvent) -> None:
        with self._changed:
            if threading.get_ident() == self._mine:
                while not event.done:
                    assert self.advance(copies=True) or self.advance(copies=False), "the streams wait for each other"
            else:
                assert self._changed.wait_for(lambda: event.done, DEADLINE), "nobody advanced the streams"

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what other threads do."""
        for _ in range(int(DEADLINE / 0.001)):
            with self._changed:
                if condition():
                    return
                self._changed.wait(0.001)
        raise AssertionError("the condition was not reached")

    def _come(self, event: FakeEvent) -> bool:
        event.done = True
        return True

    def _when_eager(self) -> None:
        while self._eager and self._compute:
            if not self.advance(copies=False):
                assert self.advance(copies=True), "computing waits for what nobody copies"
