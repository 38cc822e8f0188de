"""What threads hold of a memory tier: a use of an entry, a load that is under way, and a claim to room for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from .residency import Entry, Speculation

if TYPE_CHECKING:
    from .ram import RamTier

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Claim(Generic[K]):
    """Bytes that somebody waits for. Changed under the tier's lock."""

    __slots__ = ("granted", "key", "size")

    def __init__(self, key: K | None, size: int) -> None:
        self.key = key  # of the entry that they are for; None: for something else
        self.size = size
        self.granted = False  # promised, as by Residency.reserve


class Flight(Generic[K, V]):
    """One load that is under way or about to be. Changed under the tier's lock; `done` is set afterwards."""

    __slots__ = (
        "done",
        "ended",
        "entry",
        "error",
        "future",
        "group",
        "key",
        "pilot",
        "reserved",
        "speculation",
        "users",
        "value",
    )

    def __init__(self, key: K, group: int, reserved: int, users: int, speculation: Speculation | None = None) -> None:
        self.key = key
        self.group = group
        self.reserved = reserved  # bytes
        self.users = users  # leases that wait for it
        self.speculation = speculation
        self.done = threading.Event()
        self.ended: Callable[[], None] | None = None  # to be told, whatever came of it
        self.future: Future[None] | None = None  # of the loader thread; None: who needs it loads it
        self.pilot = 0  # the thread that needs it and loads it; 0: a loader thread
        self.value: V | None = None  # from its load until it is an entry
        self.entry: Entry[K, V] | None = None
        self.error: BaseException | None = None

    def end(self) -> None:
        """Tell all who wait what came of it. Not inside the lock: those that are called may take it."""
        self.done.set()
        if self.ended is not None:
            self.ended()


class Lease(Generic[K, V]):
    """One use of one entry, as a context manager that gives the value. Not to be entered twice at a time."""

    __slots__ = ("_entry", "_key", "_tier")

    def __init__(self, tier: RamTier[K, V], key: K, entry: Entry[K, V] | None) -> None:
        self._tier = tier
        self._key = key
        self._entry = entry

    def __enter__(self) -> V:
        """Raises what RamTier.lease says."""
        entry = self._entry
        if entry is None:
            tier = self._tier
            with tier._lock:  # a hit takes this one step: it happens top_k times per layer and token
                entry = tier._residency.acquire(self._key)
            if entry is None:
                entry = tier._obtain(self._key)
            self._entry = entry
        return entry.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry, self._entry = self._entry, None
        assert entry is not None, "left without having been entered"
        tier = self._tier
        with tier._lock:
            if tier._residency.release(entry):
                tier._notify()
