"""The content-addressed store: a node's disk tier, with a byte budget, shared safely by several processes.

Promises, whatever crashes or fills up: a final name always stands for exactly the bytes of its hash as they were
verified; `commit` returns once they survive a power cut; everything else costs at most a repeated download.

    data -> fdatasync -> rename -> fsync of the directory

It decides nothing about what to keep: a full budget is an error that says so, and eviction is the caller's policy. It
does see to it that nothing is evicted that a live process uses or a user has pinned (keeping.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from moehive.protocol.chunks import Buffer, ChunkList, chunk_range
from moehive.protocol.errors import StorageError
from moehive.protocol.ids import ModelId, ShardHash, is_hash
from moehive.protocol.limits import MAX_MANIFEST_BYTES, MAX_SHARD_BYTES

from .base import NotHeld, PartialBusy, WrongBytes
from .filesystem import LOCAL, FileSystem, storage_errors
from .keeping import Keeping
from .layout import StoreLayout
from .ledger import Ledger, Usage
from .partial import PartialObject
from .reading import VerifiedFiles, hash_file, read_object

PARTIAL_MAX_AGE = 7 * 24 * 3600.0  # seconds that an abandoned download may wait to be resumed


class ContentStore:
    """An ObjectSource that can be written to, below `root` (created when first needed), using at most `budget_bytes`.

    Methods block on the disk and may be called from any thread. Two processes may share a store: the budget counts what
    both hold; one object is downloaded by one of them at a time, and the other gets PartialBusy at once, never a wait.
    It then waits for `has` by its own clock, or fetches into memory only.
    """

    def __init__(
        self, root: Path, budget_bytes: int, *, fs: FileSystem = LOCAL, clock: Callable[[], float] = time.time
    ) -> None:
        self._layout = StoreLayout(root)
        self._fs = fs
        self._clock = clock
        self._ledger = Ledger(self._layout, budget_bytes, fs)
        self.keeping = Keeping(self._layout, self._ledger, fs, clock)  # pins, uses, and when objects were last used
        self._bad: set[ShardHash] = set()  # corrupt, and could not be moved away
        self._reader = VerifiedFiles(self.path, self.quarantine, fs=fs)

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self._layout.root

    # --- looking --------------------------------------------------------------------------------------------------

    def path(self, object_hash: ShardHash) -> Path | None:
        """See ObjectSource."""
        if not is_hash(object_hash) or object_hash in self._bad:  # the name may come from a peer
            return None
        path = self._layout.object(object_hash)
        try:
            return path if self._fs.size(path) is not None else None
        except OSError:  # an unreadable directory holds nothing that could be offered
            return None

    def has(self, object_hash: ShardHash) -> bool:
        """Whether the object is held, complete."""
        return self.path(object_hash) is not None

    def objects(self) -> Mapping[ShardHash, int]:
        """Every object held, complete, with its size in bytes."""
        with self._ledger.locked(change=False):
            return {key: size for key, size in self._ledger.objects.items() if key not in self._bad}

    def partials(self) -> Mapping[ShardHash, int]:
        """Every unfinished download, running or abandoned, with the bytes reserved for it."""
        with self._ledger.locked(change=False):
            return dict(self._ledger.partials)

    def usage(self) -> Usage:
        """What is held and reserved, by every process that shares the store."""
        with self._ledger.locked(change=False):
            return self._ledger.usage()

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """See ObjectSource."""
        return self._reader.chunk_list(object_hash)

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """See ObjectSource."""
        return self._reader.read_range(object_hash, offset, length)

    def read(self, object_hash: ShardHash, *, limit: int = MAX_MANIFEST_BYTES) -> bytes:
        """A small object (manifest, asset), whole and verified. Raises NotHeld, CorruptShard, StorageError."""
        path = self.path(object_hash)
        if path is None:
            raise NotHeld(object_hash)
        with storage_errors("read", path):
            size = self._fs.size(path) or 0
        if size > limit:
            raise StorageError(f"object {object_hash} has {size} bytes, at most {limit} are read at once")
        return bytes(read_object(self, object_hash, size, fs=self._fs))

    def verify(self, object_hash: ShardHash) -> None:
        """Hash the object's file, whatever is remembered of it. Raises what `chunk_list` raises."""
        self._reader.verify(object_hash)

    # --- writing --------------------------------------------------------------------------------------------------

    def open_partial(self, object_hash: ShardHash, chunks: ChunkList) -> PartialObject:
        """A download of `object_hash`; enter it to reserve the space (see PartialObject).

        Raises WrongBytes where `chunks` is not the list of that object: whoever supplied it is to blame.
        """
        if chunks.root != object_hash:
            raise WrongBytes(f"a chunk list with root {chunks.root} was offered for object {object_hash}")
        if chunks.size > MAX_SHARD_BYTES:
            raise WrongBytes(f"object {object_hash} of {chunks.size} bytes; at most {MAX_SHARD_BYTES} are stored")
        return PartialObject(self, object_hash, chunks, self._fs)

    def put(self, source: Buffer | Path, *, expected: ShardHash | None = None) -> ShardHash:
        """Store bytes or a copy of a file; its name.

        Raises WrongBytes where that name is not `expected`, or the file changes meanwhile; DiskFull, PartialBusy,
        StorageError.
        """
        if isinstance(source, Path):
            chunks = hash_file(source, fs=self._fs)
        else:
            chunks = ChunkList.of(source)
        object_hash = chunks.root if expected is None else expected
        with self.open_partial(object_hash, chunks) as partial:
            if isinstance(source, Path):
                self._copy_chunks(source, partial)
            else:
                view = memoryview(source)
                for index in partial.missing():
                    offset, length = chunk_range(index, chunks.size)
                    partial.write_chunk(index, view[offset : offset + length])
            partial.commit()
        return object_hash

    def delete(self, object_hash: ShardHash) -> bool:
        """Remove a finished object; whether there was one. Open files go on being readable. Raises StorageError."""
        if not is_hash(object_hash):
            return False
        with self._ledger.locked(change=True):
            return self._delete(object_hash)

    def drop_partial(self, object_hash: ShardHash) -> bool:
        """Remove an abandoned download; False where there is none, or where it is running. Raises StorageError."""
        with self._ledger.locked(change=True):
            return object_hash in self._ledger.partials and self._drop_partial(object_hash)

    def sweep(self, max_age: float = PARTIAL_MAX_AGE) -> int:
        """Remove what crashes left behind and nobody can use: the bytes that were freed. Call it once at start.

        That is downloads of objects that are finished, downloads without a byte, and those that nobody went on with for
        `max_age` seconds; others are kept, to be resumed.
        """
        freed, now = 0, self._clock()
        with self._ledger.locked(change=True):
            for object_hash, size in list(self._ledger.partials.items()):
                finished = object_hash in self._ledger.objects and object_hash not in self._bad
                with storage_errors("read", path := self._layout.partial(object_hash)):
                    old = now - (self._fs.modified(path) or now) > max_age
                if (finished or old or size == 0) and self._drop_partial(object_hash):
                    freed += size
        return freed

    def quarantine(self, object_hash: ShardHash) -> None:
        """See ObjectSource. The file becomes a download of the same object: only its bad chunks are fetched again."""
        self._bad.add(object_hash)  # first, and for good if the disk refuses the rest
        self._reader.forget(object_hash)
        path, partial = self._layout.object(object_hash), self._layout.partial(object_hash)
        with self._ledger.locked(change=True), storage_errors("quarantine", path):
            size = self._ledger.objects.pop(object_hash, None)
            if size is not None and object_hash in self._ledger.partials:
                self._ledger.remove(path)
            elif size is not None:
                self._fs.rename(path, partial)
                self._ledger.partials[object_hash] = size
        self._bad.discard(object_hash)

    # --- keeping --------------------------------------------------------------------------------------------------

    def evict(self, victims: Iterable[ShardHash], *, pins: frozenset[ModelId]) -> int:
        """Delete objects and abandoned downloads that a policy has chosen; the bytes that were freed.

        What came into use since is left alone; everything is where the pins are not `pins`, by which it chose. Raises
        StorageError.
        """
        freed = 0
        with self._ledger.locked(change=True):
            kept = self.keeping.scan()
            if kept.pins != pins:
                return 0
            for victim in victims:
                if victim not in kept.in_use:
                    freed += self._evict(victim)
        return freed

    # --- what PartialObject asks ----------------------------------------------------------------------------------

    def open_file(self, object_hash: ShardHash, size: int) -> tuple[int | None, Path, bool]:
        """See partial.Home."""
        fs, path = self._fs, self._layout.partial(object_hash)
        with self._ledger.locked(change=True):
            if self.has(object_hash):
                self._sync_name(object_hash)  # whoever published it may have been killed, or have failed, before that
                return None, self._layout.object(object_hash), False
            fresh = object_hash not in self._ledger.partials
            self._ledger.reserve(object_hash, size)
            with storage_errors("open", path):
                fd = fs.open_write(path)
            try:
                with storage_errors("reserve space for", path):
                    if not fs.try_lock(fd):
                        raise PartialBusy(object_hash)
                    fs.allocate(fd, size)
            except BaseException:
                if fresh:
                    with suppress(OSError, StorageError):  # what cannot be removed now is swept at the next start
                        self._ledger.remove(path)
                fs.close(fd)
                raise
        return fd, path, fresh

    def publish(self, chunks: ChunkList, object_hash: ShardHash) -> Path:
        """See partial.Home."""
        path = self._layout.object(object_hash)
        with self._ledger.locked(change=True), storage_errors("finish", path):
            if object_hash not in self._ledger.objects or object_hash in self._bad:  # else: syncing failed last time
                self._ledger.make_fan_out(object_hash)
                self._fs.rename(self._layout.partial(object_hash), path)
            self._ledger.partials.pop(object_hash, None)
            self._ledger.objects[object_hash] = chunks.size
            self._bad.discard(object_hash)
            self._reader.remember(chunks)
        self._sync_name(object_hash)
        return path

    def discard(self, object_hash: ShardHash) -> None:
        """See partial.Home."""
        path = self._layout.partial(object_hash)
        with self._ledger.locked(change=True), storage_errors("delete", path):
            self._ledger.remove(path)
            self._ledger.partials.pop(object_hash, None)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _sync_name(self, object_hash: ShardHash) -> None:
        """Make an object's final name durable."""
        with storage_errors("sync", path := self._layout.object(object_hash).parent):
            self._ledger.make_fan_out(object_hash)
            self._fs.fsync_dir(path)

    def _evict(self, victim: ShardHash) -> int:
        """Inside the ledger's lock: bytes freed."""
        freed = self._ledger.partials.get(victim, 0)
        if victim in self._ledger.partials and not self._drop_partial(victim):
            freed = 0
        if victim in self._ledger.objects:
            freed += self._ledger.objects[victim]
            self._delete(victim)
        return freed

    def _delete(self, object_hash: ShardHash) -> bool:
        """Inside the ledger's lock: whether there was one."""
        with storage_errors("delete", path := self._layout.object(object_hash)):
            self._ledger.remove(path)
        self._reader.forget(object_hash)
        self._bad.discard(object_hash)
        return self._ledger.objects.pop(object_hash, None) is not None

    def _drop_partial(self, object_hash: ShardHash) -> bool:
        """Inside the ledger's lock."""
        fs, path = self._fs, self._layout.partial(object_hash)
        with storage_errors("delete", path):
            fd = fs.open_write(path)
            try:
                if not fs.try_lock(fd):
                    return False
                self._ledger.remove(path)
            finally:
                fs.close(fd)
        self._ledger.partials.pop(object_hash, None)
        return True

    def _copy_chunks(self, source: Path, partial: PartialObject) -> None:
        with storage_errors("read", source):
            fd = self._fs.open_read(source)
            try:
                for index in partial.missing():
                    offset, length = chunk_range(index, partial.chunks.size)
                    partial.write_chunk(index, self._fs.pread(fd, length, offset))
            finally:
                self._fs.close(fd)
