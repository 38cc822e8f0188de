"""What a store must not lose: the objects that live processes use, and the models that users have pinned.

Also when each object was last used, which is no promise but a hint: the time of modification of its file. There is no
database: a pin is a file, a use is a locked file, and nothing of it can be out of step with the objects. Who deletes it
all costs worse evictions, never a wrong byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType

from moehive.protocol.errors import StorageError
from moehive.protocol.ids import ModelId, ShardHash, is_hash

from .filesystem import FileSystem, storage_errors
from .layout import StoreLayout
from .ledger import Ledger
from .uses import InUse, Uses


@dataclass(frozen=True, slots=True)
class Kept:
    """What may not be evicted now."""

    pins: frozenset[ModelId]
    in_use: InUse


class Keeping:
    """The keeping of one store. Made by ContentStore. Methods block on the disk and may be called from any thread."""

    def __init__(self, layout: StoreLayout, ledger: Ledger, fs: FileSystem, clock: Callable[[], float]) -> None:
        self._layout = layout
        self._ledger = ledger
        self._fs = fs
        self._clock = clock
        self._uses = Uses(layout, fs)

    def use(self, objects: Collection[ShardHash]) -> AbstractContextManager[None]:
        """Keep every process from evicting `objects`, held already or not, while the context lasts.

        The end of this process ends it too, however it comes. Entering raises StorageError.
        """
        return _Use(self, objects)

    def now(self) -> Kept:
        """Pins and uses, this process' own included. Raises StorageError."""
        with self._ledger.locked(change=False):
            return self.scan()

    def scan(self) -> Kept:
        """`now`, for the store, which holds the ledger's lock already."""
        return Kept(self._pins(), self._uses.scan())

    def last_used(self, object_hash: ShardHash) -> float:
        """When an object or a download of it was last used, in seconds since the epoch; 0.0 if that is not known.

        Never in the future: whoever set the clock ahead, used an object, and set it right again would keep it for ever.
        """
        layout = self._layout
        for path in (layout.object(object_hash), layout.partial(object_hash)):
            with storage_errors("read", path):
                seconds = self._fs.modified(path)
            if seconds is not None:
                return min(seconds, self._clock())
        return 0.0

    def pin(self, model: ModelId) -> None:
        """Keep what is or comes to be held of a model until it is unpinned. Durable. Raises StorageError."""
        with self._ledger.locked(change=True), storage_errors("create", path := self._layout.pin(model)):
            self._fs.close(self._fs.open_write(path))
            self._fs.fsync_dir(path.parent)

    def unpin(self, model: ModelId) -> bool:
        """The opposite of `pin`; whether the model was pinned. Raises StorageError."""
        with self._ledger.locked(change=True), storage_errors("delete", path := self._layout.pin(model)):
            pinned = model in self._pins()
            self._fs.unlink(path)
            self._fs.fsync_dir(path.parent)
        return pinned

    # --- what a use asks ------------------------------------------------------------------------------------------

    def begin_use(self, objects: Collection[ShardHash]) -> Callable[[], None]:
        """Begin a use; what ends it."""
        with self._ledger.locked(change=False):
            fd, path = self._uses.begin(objects)
        self._touch(objects)

        def end() -> None:
            self._touch(objects)
            with suppress(StorageError):  # without its lock the file means nothing, and whoever finds it removes it
                self._uses.end(fd, path)

        return end

    # --- parts ----------------------------------------------------------------------------------------------------

    def _pins(self) -> frozenset[ModelId]:
        with storage_errors("read", self._layout.pins):
            return frozenset(ModelId(name) for name in self._fs.listdir(self._layout.pins) if is_hash(name))

    def _touch(self, objects: Iterable[ShardHash]) -> None:
        now = self._clock()
        for object_hash in objects:
            with suppress(OSError):  # not here yet; or the file is another user's
                self._fs.touch(self._layout.object(object_hash), now)


class _Use:
    """One use, as a context. Not a generator: one that is dropped ends nothing before its process does."""

    def __init__(self, keeping: Keeping, objects: Collection[ShardHash]) -> None:
        self._keeping = keeping
        self._objects = objects
        self._end: Callable[[], None] | None = None

    def __enter__(self) -> None:
        if self._objects:
            self._end = self._keeping.begin_use(self._objects)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._end is not None:
            self._end()
