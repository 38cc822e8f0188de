"""A model's objects into a store, wherever they can be had: from peers, and where those lack them from permanent seeds.

Where the store's budget is full, room is made of what is safe to lose. What is being fetched is in use meanwhile, so
that neither this process nor another one evicts what has just come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.manifest import MANIFEST_NAME, Manifest, ShardEntry
from moehive.protocol.units import format_size

from .log import get_logger
from .member import Member
from .replicas import count_copies
from .room import Room
from .seeds.base import SeedName
from .store.base import DiskBudgetFull, WrongBytes
from .store.content import ContentStore
from .threads import entered, to_its_end
from .transfer.downloader import OnDone
from .transfer.progress import Observer
from .transfer.sources import Wanted

T = TypeVar("T")
_log = get_logger(__name__)


class ModelFetcher:
    """Objects of models into `store`. Used on the event loop.

    `seeds` stand in for peers that are missing. A directory among them that does not fit a model is an error, or with
    `several` only a warning: the user of several models names the seeds of them all.
    """

    def __init__(
        self, member: Member, store: ContentStore, seeds: Sequence[SeedName] = (), *, several: bool = False
    ) -> None:
        self.store = store
        self._member = member
        self._seeds = seeds
        self._several = several
        self._room = Room(store, partial(count_copies, member))

    async def manifest(self, model: ModelId, *, timeout: float = 30.0) -> Manifest:
        """A model's manifest, from the store, a seed that is a converted directory, or any peer of the model.

        From now on the seeds supply what the model consists of. Raises ModelUnavailable, ShardUnavailable,
        ManifestError, SeedError, DiskFull, StorageError, TransportError.
        """
        key = ShardHash(model)
        async with entered(self.store.keeping.use([key])):
            if not (await asyncio.to_thread(self.store.has, key) or await self._manifest_of_seed(key)):
                directory = await self._member.wait_for_peers(model, timeout=timeout)
                wanted = self._member.wanted(directory)
                await self._with_room(partial(self._member.downloads.fetch, wanted, self.store, timeout=timeout), ())
            manifest = Manifest.from_bytes(await asyncio.to_thread(self.store.read, key))
        for name in self._seeds:
            self._member.seeds.add(name, manifest)
        for error in await self._member.seeds.open_nearby():
            if not self._several:
                raise error
            _log.warning("seed is of no use for this model", model=manifest.model.name, reason=str(error))
        return manifest

    async def skeleton(self, manifest: Manifest, *, timeout: float = 30.0, observer: Observer | None = None) -> None:
        """The dense part, shared experts and assets of a model. Raises ModelUnavailable and as `fetch`."""
        missing = [shard for shard in manifest.skeleton if not self.store.has(shard.hash)]
        if missing and not self._seeds:
            await self._member.wait_for_peers(manifest.model_id, timeout=timeout)
        for failure in (await self.fetch(manifest, missing, timeout=timeout, observer=observer)).values():
            raise failure

    async def fetch(
        self,
        manifest: Manifest,
        shards: Iterable[ShardEntry],
        *,
        timeout: float = 30.0,
        observer: Observer | None = None,
        on_done: OnDone = lambda wanted, path: None,
    ) -> Mapping[ShardHash, ShardUnavailable]:
        """Shards of a model; what nobody could supply. See Downloader.fetch_many.

        Raises DiskBudgetFull where the budget has no room and none can be made, and before anything is fetched where
        it could not hold them even if it were empty; DiskFull, StorageError, TransportError.
        """
        entries = {shard.hash: shard for shard in shards}
        directory = self._member.directory(manifest.model_id)
        done: set[ShardHash] = set()

        def once(wanted: Wanted, path: Path) -> None:
            if wanted.hash not in done:
                done.add(wanted.hash)
                on_done(wanted, path)

        async with entered(self.store.keeping.use([ShardHash(manifest.model_id), *entries])):
            await asyncio.to_thread(self._check_budget, entries.values())
            wanted = [self._member.wanted(directory, shard) for shard in entries.values()]
            fetch = self._member.downloads.fetch_many
            return await self._with_room(
                partial(fetch, wanted, self.store, timeout=timeout, observer=observer, on_done=once), entries.values()
            )

    # --- parts ----------------------------------------------------------------------------------------------------

    async def _manifest_of_seed(self, key: ShardHash) -> bool:
        """Store the manifest of a seed that has it; whether one has."""
        for name in self._seeds:
            path = name.directory and name.directory / MANIFEST_NAME
            if path is not None and path.is_file():
                try:
                    await to_its_end(partial(self.store.put, path, expected=key))
                except WrongBytes:  # of another model, or another version of it: its shards may be right all the same
                    continue
                return True
        return False

    def _check_budget(self, shards: Collection[ShardEntry]) -> None:
        usage, total = self.store.usage(), sum(shard.size for shard in shards)
        if total > usage.budget_bytes:
            what = f"the {len(shards)} shards of {format_size(total)}"
            raise DiskBudgetFull(
                self.store.root, what, needed=self._missing(shards), used=usage.used_bytes, budget=usage.budget_bytes
            )

    def _missing(self, shards: Collection[ShardEntry]) -> int:
        """Bytes that are still to be reserved for shards."""
        objects, partials = self.store.objects(), self.store.partials()
        return sum(max(0, shard.size - partials.get(shard.hash, 0)) for shard in shards if shard.hash not in objects)

    async def _with_room(self, fetch: Callable[[], Awaitable[T]], shards: Collection[ShardEntry]) -> T:
        """Fetch, making room when there is none: for all of `shards` that is missing, or else for what is next."""
        while True:
            try:
                return await fetch()
            except DiskBudgetFull as full:
                missing = await asyncio.to_thread(self._missing, shards)
                whole = full.used + missing - full.budget
                if not (whole > full.short and await self._room.make(whole)) and not await self._room.make(full.short):
                    raise
