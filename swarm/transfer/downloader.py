"""Objects from many peers at once, into a store or into memory: every chunk verified before anybody sees it.

    async with Downloader(stream_channels(pool), standings) as downloads:
        path = await downloads.fetch(Wanted(shard.hash, find_sources), store)

All downloads of a process share one engine: a peer has one channel, one pace, one depth, whatever is fetched from it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from moehive.protocol.bits import Bits, full, indices
from moehive.protocol.chunks import ChunkList, chunk_range
from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import PeerId, ShardHash
from moehive.swarm.policy.expectation import ItemKey
from moehive.swarm.standings import Standings
from moehive.swarm.store.base import PartialBusy
from moehive.swarm.store.partial import PartialObject
from moehive.swarm.tasks import task_group
from moehive.swarm.threads import entered, to_its_end

from .channel import OpenChannel
from .download import Download
from .engine import Engine
from .partials import Partials
from .progress import Meter, Observer, Share
from .sinks import MemorySink, ObjectStore, missing_of
from .sources import Wanted
from .traffic import Counters

OBJECTS_AT_ONCE = 16  # small ones then flow without a pause of a round trip for each
SYNC_EVERY = 0.25  # seconds: often enough that little is left, seldom enough that it costs nothing
LOOK_AGAIN = 0.25  # seconds between looks whether another process has finished an object

OnDone = Callable[[Wanted, Path], None]


class Downloader:
    """An async context manager; its methods are called on the event loop that entered it.

    Args:
        open_channel: the carrier.
        standings: where lies are counted; it must use the same clock.
        clock: seconds, monotonic.
        seed: of the chunk that each download begins with; give every peer its own.
    """

    def __init__(
        self,
        open_channel: OpenChannel,
        standings: Standings,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: str = "",
    ) -> None:
        self.partials = Partials()
        self._engine = Engine(open_channel, standings, clock=clock, seed=seed)
        self._numbers = itertools.count()

    async def __aenter__(self) -> Self:
        await self._engine.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.__aexit__(kind, error, trace)

    @property
    def stats(self) -> Counters:
        """Bytes received, and what was no use."""
        return self._engine.traffic.counters

    @property
    def sending(self) -> Mapping[PeerId, float]:
        """Who is sending now, with bytes per second."""
        return self._engine.traffic.sending()

    async def fetch(
        self, wanted: Wanted, store: ObjectStore, *, timeout: float = 60.0, observer: Observer | None = None
    ) -> Path:
        """The object's file in `store`, complete and verified; an unfinished download is gone on with.

        After `timeout` seconds without progress and without anybody who could go on, raises ShardUnavailable, which
        names every peer that failed and why. Raises DiskFull, StorageError, and what `wanted.find` raises.
        """
        meter = Meter(observer, wanted.size, 1)
        async with meter.reporting(self._engine.traffic.sending):
            return await self._fetch(wanted, store, meter, timeout)

    async def fetch_many(
        self,
        wanted: Iterable[Wanted],
        store: ObjectStore,
        *,
        timeout: float = 60.0,
        observer: Observer | None = None,
        on_done: OnDone = lambda wanted, path: None,
    ) -> Mapping[ShardHash, ShardUnavailable]:
        """Many objects, some at a time, begun in the given order; what nobody could supply.

        `on_done` is called on the event loop as each one is complete. `timeout` is waited for once, not for each: who
        has one of the others is known by then. Raises as `fetch` does, except ShardUnavailable; what is complete stays.
        """
        everything = list(wanted)
        meter = Meter(observer, sum(each.size for each in everything), len(everything))
        left, failures = iter(everything), dict[ShardHash, ShardUnavailable]()

        async def work() -> None:
            for each in left:
                try:
                    path = await self._fetch(each, store, meter, 0.0 if failures else timeout)
                except ShardUnavailable as error:
                    failures[each.hash] = error
                else:
                    on_done(each, path)

        async with meter.reporting(self._engine.traffic.sending), task_group() as workers:
            for _ in range(min(OBJECTS_AT_ONCE, len(everything))):
                workers.create_task(work(), name="download")
        return failures

    async def fetch_to_memory(self, wanted: Wanted, buffer: memoryview, *, deadline: float) -> None:
        """The object, verified, into `buffer`, which has its size, within `deadline` seconds in all.

        It goes before everything that is fetched into a store, and touches no disk. Raises ShardUnavailable, and
        ManifestError for a buffer of another size; its contents are then worth nothing.
        """
        started = self._engine.now
        download = self._download(wanted, Share(Meter(None, 0, 1), 0), timeout=math.inf, urgent=True)
        async with download.running():
            try:
                async with asyncio.timeout(deadline):
                    sink = MemorySink(await download.chunk_list(), buffer)
                    await download.fetch(sink, full(len(sink.chunks.hashes)))
            except TimeoutError as error:
                raise download.unavailable(f"not complete after {self._engine.now - started:.2f} s") from error

    # --- parts ----------------------------------------------------------------------------------------------------

    def _download(self, wanted: Wanted, share: Share, *, timeout: float, urgent: bool = False) -> Download:
        key = ItemKey(f"{wanted.hash[:16]} {next(self._numbers)}")
        return Download(self._engine, wanted, key, share, urgent=urgent, timeout=timeout)

    async def _fetch(self, wanted: Wanted, store: ObjectStore, meter: Meter, timeout: float) -> Path:
        share = Share(meter, wanted.size)
        path = await asyncio.to_thread(store.path, wanted.hash)
        while path is None:
            try:
                path = await self._fetch_into(store, wanted, share, timeout)
            except PartialBusy:  # another download of this machine has it, and will finish it or leave it
                await asyncio.sleep(LOOK_AGAIN)
                path = await asyncio.to_thread(store.path, wanted.hash)
        share.complete()
        return path

    async def _fetch_into(self, store: ObjectStore, wanted: Wanted, share: Share, timeout: float) -> Path:
        download = self._download(wanted, share, timeout=timeout)
        async with download.running():
            chunks = await download.chunk_list()
            async with entered(store.open_partial(wanted.hash, chunks)) as partial:
                missing = await asyncio.to_thread(missing_of, partial)
                share.found(_size_of(full(len(chunks.hashes)) & ~missing, chunks))
                with self.partials.offered(partial):
                    async with _kept_synced(partial):
                        await download.fetch(partial, missing)
                    return await to_its_end(partial.commit)


def _size_of(present: Bits, chunks: ChunkList) -> int:
    return sum(chunk_range(index, chunks.size)[1] for index in indices(present))


@asynccontextmanager
async def _kept_synced(partial: PartialObject) -> AsyncIterator[None]:
    """Have the disk take what comes while more comes, so that it is not waited for at the end."""

    async def keep() -> None:
        while True:
            await asyncio.sleep(SYNC_EVERY)
            await to_its_end(partial.sync)

    async with task_group() as tasks:
        keeping = tasks.create_task(keep(), name=f"sync of {partial.object_hash}")
        yield
        keeping.cancel()
