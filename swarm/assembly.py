"""A converted directory that is put together from a swarm: complete and verified, or visibly unfinished.

Shards are downloaded into a store of its own below `.partial-fetch`, on the same device, and renamed to their places;
what the user's cache holds already is linked or copied from there. A file under its own name is always verified; the
manifest, which makes the directory usable, comes last. After any crash the same command goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moehive.protocol.errors import DestinationError, DiskFull, StorageError
from moehive.protocol.manifest import MANIFEST_NAME, Manifest, ShardEntry
from moehive.protocol.units import format_size

from .placing import place, write_file
from .store.base import ObjectSource
from .store.content import ContentStore
from .store.filesystem import LOCAL, storage_error, storage_errors
from .store.reading import hash_file
from .threads import is_unwanted

WORK = ".partial-fetch"
_MARK = "model"  # in it: the id of the model that is being put together
_NO_BUDGET = 1 << 62  # the user named the place; the disk itself is the bound
_READERS = 4  # files hashed at a time
Found = Callable[[int], None]  # bytes of a file that is there already, verified


class Assembly:
    """One directory. Methods block on the disk: `begin`, then `find`, then downloads into `store`, then `finish`; and
    `leave`, however it ended.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.store = ContentStore(root / WORK / "store", _NO_BUDGET)
        self._manifest = manifest
        self._made: list[Path] = []  # directories, innermost first

    def begin(self) -> None:
        """Take the directory. Raises DestinationError where it holds something else, StorageError."""
        _check_ours(self.root, self._manifest)
        with storage_errors("create", self.root / WORK):
            work = (self.root / WORK).absolute()
            self._made = [path for path in (work, *work.parents) if not path.exists()]
            (self.root / WORK).mkdir(parents=True, exist_ok=True)
            write_file(self.root / WORK / _MARK, self._manifest.model_id.encode())

    def find(self, shards: Sequence[ShardEntry], cache: ObjectSource, found: Found) -> list[ShardEntry]:
        """Put what is in `cache` into its place; returns the shards that have to be fetched.

        Files that are in place already are hashed; those that are wrong are fetched again. Raises StorageError;
        DiskFull where the disk has no room for the rest.
        """

        def look(shard: ShardEntry) -> bool:
            here = self._is_right(shard) or self._take_from(cache, shard)
            if here:
                found(shard.size)
            return here

        missing = []
        with ThreadPoolExecutor(_READERS, thread_name_prefix="find") as pool:
            for shard, here in zip(shards, pool.map(look, shards), strict=True):
                if is_unwanted():
                    raise StorageError("given up")
                if not here:
                    missing.append(shard)
        self._check_space(missing)
        return missing

    def finish(self, shards: Iterable[ShardEntry]) -> None:
        """Put downloaded shards into their places and, last, the manifest. Raises StorageError."""
        left = [shard for shard in shards if not (self.root / shard.file).exists()]
        uses = {key: sum(shard.hash == key for shard in left) for key in {shard.hash for shard in left}}
        for shard in left:
            uses[shard.hash] -= 1
            self._take(shard, last=not uses[shard.hash])
        with storage_errors("finish", self.root):
            for directory in {path.parent for path in self._places()} | {self.root}:
                LOCAL.fsync_dir(directory)
            write_file(self.root / MANIFEST_NAME, self._manifest.to_bytes())
            LOCAL.fsync_dir(self.root)
            shutil.rmtree(self.root / WORK)
            LOCAL.fsync_dir(self.root)

    def leave(self) -> None:
        """Where nothing has come, leave no directory behind that `begin` made; else all stays, to be gone on with."""
        if not self._made or not (self.root / WORK).exists():
            return
        with suppress(OSError, StorageError):
            if not any((*self._places(), *self.store.partials(), *self.store.objects())):
                shutil.rmtree(self.root / WORK)
                for directory in self._made[1:]:
                    directory.rmdir()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[Path]:
        return (path for shard in self._manifest.shards if (path := self.root / shard.file).exists())

    def _is_right(self, shard: ShardEntry) -> bool:
        """Whether a shard is in its place; a wrong file is removed from there."""
        path = self.root / shard.file
        if not path.is_file():
            return False
        if path.stat().st_size == shard.size and hash_file(path).root == shard.hash:
            return True
        with storage_errors("delete", path):
            path.unlink()
        return False

    def _take_from(self, cache: ObjectSource, shard: ShardEntry) -> bool:
        source, target = cache.path(shard.hash), self.root / shard.file
        if source is None:
            return False
        try:
            place(source, target, independent=True)
        except FileNotFoundError:  # evicted meanwhile
            return False
        except OSError as error:
            raise storage_error("write", target, error) from error
        if self._is_right(shard):
            return True
        cache.quarantine(shard.hash)
        return False

    def _take(self, shard: ShardEntry, *, last: bool) -> None:
        """Move a shard from the store; `last`: no other file has the same bytes."""
        source, target = self.store.path(shard.hash), self.root / shard.file
        assert source is not None, shard
        with storage_errors("move", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if last:
                source.rename(target)
            else:
                place(source, target)

    def _check_space(self, missing: Iterable[ShardEntry]) -> None:
        begun = {**self.store.partials(), **self.store.objects()}
        sizes = {shard.hash: shard.size for shard in missing}
        needed = sum(max(0, size - begun.get(key, 0)) for key, size in sizes.items())
        with storage_errors("look at", self.root):
            status = os.statvfs(self.root)
        free = status.f_bavail * status.f_frsize
        if needed > free:
            raise DiskFull(f"{self.root}: {format_size(needed)} are needed, {format_size(free)} are free; make room")


def _check_ours(root: Path, manifest: Manifest) -> None:
    elsewhere = "choose another directory, or remove it"
    if not root.exists():
        return
    if not root.is_dir():
        raise DestinationError(f"{root} is a file; {elsewhere}")
    mark, own = root / WORK / _MARK, root / MANIFEST_NAME
    with storage_errors("read", root):
        if own.exists():
            if own.read_bytes() != manifest.to_bytes():
                raise DestinationError(f"{root} holds another model; {elsewhere}")
        elif mark.exists():
            if mark.read_text() != manifest.model_id:
                raise DestinationError(f"{root} holds the unfinished download of model {mark.read_text()}; {elsewhere}")
        elif strange := sorted({path.name for path in root.iterdir()} - {WORK}):
            raise DestinationError(f"{root} holds other files, such as {strange[0]}; {elsewhere}")
