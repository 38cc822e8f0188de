"""What threads hold of a memory tier: a use of an entry, a load that is under way, and a claim to room for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

from .residency import Speculation, Use

if TYPE_CHECKING:
    from .ram import RamTier

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Claim(Generic[K]):
    """Bytes that somebody waits for. Changed under the tier's lock."""

    __slots__ = ("granted", "key", "size", "thread")

    def __init__(self, key: K | None, size: int) -> None:
        self.key = key  # of the entry that they are for; None: for something else
        self.size = size
        self.granted = False  # promised, as by Residency.reserve
        self.thread = get_ident()


class Flight(Generic[K, V]):
    """One load that is under way or about to be. Changed under the tier's lock; `done` is set afterwards."""

    __slots__ = (
        "done",
        "ended",
        "error",
        "future",
        "group",
        "key",
        "landed",
        "pilot",
        "reserved",
        "speculation",
        "users",
        "value",
    )

    def __init__(self, key: K, group: int, reserved: int, speculation: Speculation | None = None) -> None:
        self.key = key
        self.group = group
        self.reserved = reserved  # bytes
        self.users: list[Use[K, V]] = []  # that wait for it
        self.speculation = speculation
        self.done = threading.Event()
        self.ended: Callable[[], None] | None = None  # to be told, whatever came of it
        self.future: Future[None] | None = None  # of the loader thread; None: who needs it loads it
        self.pilot = 0  # the thread that needs it and loads it; 0: a loader thread
        self.value: V | None = None  # from its load until it is an entry
        self.landed = False  # it is an entry, which its users use
        self.error: BaseException | None = None

    def end(self) -> None:
        """Tell all who wait what came of it. Not inside the lock: those that are called may take it."""
        self.done.set()
        if self.ended is not None:
            self.ended()


class Lease(Use[K, V]):
    """One use of one entry, as a context manager that gives the value. Not to be entered twice at a time."""

    __slots__ = ("_key", "_tier")

    def __init__(self, tier: RamTier[K, V], key: K) -> None:
        super().__init__(get_ident())
        self._tier = tier
        self._key = key

    def __enter__(self) -> V:
        """Raises what RamTier.lease says."""
        tier = self._tier
        if self not in tier._residency.uses:  # else it was tried before
            with tier._lock:  # a hit takes this one step: it happens for each expert of a prompt's layer
                found = tier._residency.acquire((self._key,), self)
            if not found:
                tier._obtain(self._key, self)
        entry = self.entries[0]
        assert entry is not None, "it is not resident"
        return entry.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tier = self._tier
        if self in tier._residency.uses:  # else it was taken back; the collector may be who ends it, inside the lock
            with tier._lock:
                tier._residency.release(self)
                tier._notify()
        self.entries = ()
