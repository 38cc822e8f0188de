"""Fetching a model, or chosen parts of it, into the store or into a directory of its own; resumable in both."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.manifest import Manifest, ShardEntry

from .assembly import Assembly
from .member import Member
from .model_fetcher import ModelFetcher
from .seeds.base import SeedName
from .store.content import ContentStore
from .threads import entered, to_its_end
from .transfer.progress import TransferProgress

Choose = Callable[[Manifest], Sequence[ShardEntry]]


class Watcher(Protocol):
    """Whoever wants to see how far it is."""

    def begin(self, manifest: Manifest, total: int) -> None:
        """It is known what is wanted: `total` bytes."""

    def found(self, size: int) -> None:
        """So many of them were here already. Called from threads, several at a time."""

    def transfer(self, progress: TransferProgress) -> None:
        """The rest, on the event loop."""


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """What was fetched. Sizes in bytes."""

    manifest: Manifest
    shards: tuple[ShardEntry, ...]
    found: int  # was here before
    seconds: float  # without those until the model was known

    @property
    def size(self) -> int:
        """All of it."""
        return sum(shard.size for shard in self.shards)


class ModelFetch:
    """One fetch of a model. Everything that is named was checked; `run` does it.

    Args:
        member: of the swarm; entered.
        cache: the user's store. Without `to` everything goes there; with it, it supplies what it has.
        choose: which shards of the model.
        to: a directory to put together; it is then a converted directory, with the chosen experts.
        seeds: stand in for peers that are missing.
        timeout: seconds without progress and without anybody who could go on.
    """

    def __init__(
        self,
        member: Member,
        cache: ContentStore,
        choose: Choose,
        watcher: Watcher,
        *,
        to: Path | None = None,
        seeds: Sequence[SeedName] = (),
        timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member = member
        self._cache = cache
        self._choose = choose
        self._watcher = watcher
        self._to = to
        self._seeds = seeds
        self._timeout = timeout
        self._clock = clock
        self._found = 0
        self._lock = threading.Lock()

    async def run(self, model: ModelId) -> FetchedModel:
        """Fetch, and return once all of it is verified and durable. Cancelled, it keeps what has come.

        Raises ModelUnavailable, ShardUnavailable, ManifestError, DestinationError, SeedError, DiskFull, StorageError,
        TransportError, and what `choose` raises.
        """
        fetcher = ModelFetcher(self._member, self._cache, self._seeds)
        manifest = await fetcher.manifest(model, timeout=self._timeout)
        shards, started = tuple(self._choose(manifest)), self._clock()
        self._watcher.begin(manifest, sum(shard.size for shard in shards))
        async with entered(self._cache.keeping.use([ShardHash(model), *(shard.hash for shard in shards)])):
            if self._to is None:
                await self._into_store(fetcher, manifest, shards)
            else:
                await self._into_directory(Assembly(self._to, manifest), manifest, shards)
        return FetchedModel(manifest, shards, self._found, self._clock() - started)

    async def _into_store(self, fetcher: ModelFetcher, manifest: Manifest, shards: Sequence[ShardEntry]) -> None:
        objects = await asyncio.to_thread(self._cache.objects)
        missing = [shard for shard in shards if shard.hash not in objects]
        self._add(sum(shard.size for shard in shards) - sum(shard.size for shard in missing))
        await self._fetch(fetcher, manifest, missing)

    async def _into_directory(self, assembly: Assembly, manifest: Manifest, shards: Sequence[ShardEntry]) -> None:
        try:
            await to_its_end(assembly.begin)
            missing = await to_its_end(assembly.find, shards, self._cache, self._add)
            await self._fetch(ModelFetcher(self._member, assembly.store, self._seeds), manifest, missing)
            await to_its_end(assembly.finish, shards)
        finally:
            await to_its_end(assembly.leave)

    async def _fetch(self, fetcher: ModelFetcher, manifest: Manifest, missing: Sequence[ShardEntry]) -> None:
        failures = await fetcher.fetch(manifest, missing, timeout=self._timeout, observer=self._watcher.transfer)
        _raise_any(failures)

    def _add(self, size: int) -> None:
        with self._lock:
            self._found += size
        self._watcher.found(size)


def _raise_any(failures: Mapping[ShardHash, ShardUnavailable]) -> None:
    """One error for all that nobody could supply: the first of them, and how many there are."""
    for error in failures.values():
        if len(failures) > 1:
            raise ShardUnavailable(f"{error.name} and {len(failures) - 1} more", error.detail) from error
        raise error
