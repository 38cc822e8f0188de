"""Getting what a node is to hold: verified where it lies, or fetched from the swarm; and giving up what others hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.ids import ShardHash
from moehive.protocol.manifest import ShardEntry
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.model_fetcher import ModelFetcher
from moehive.swarm.policy.rebalance import Change
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.threads import to_its_end
from moehive.swarm.transfer.sources import Wanted

from .holdings import Holdings
from .placement import Placement
from .settings import NodeSettings, Publishing

FIRST_TRY = 10.0  # seconds of waiting for somebody who can supply what is missing, before the node starts without it
LOOK_EVERY = 30.0  # seconds between attempts to get what nobody could supply, and between looks at what the swarm lacks
_JITTER = 0.25  # of that: nodes that started together need not look together
_log = get_logger(__name__)


class Acquisition:
    """Fills `holdings`. `first_pass` gets what can be had now, `maintain` the rest, and what comes to be lacking."""

    def __init__(
        self,
        settings: NodeSettings,
        member: Member,
        source: ObjectSource,
        holdings: Holdings,
        placement: Placement,
        *,
        on_selected: Callable[[int], None] = lambda experts: None,
    ) -> None:
        self._settings = settings
        self._source = source
        self._holdings = holdings
        self._placement = placement
        # A converted directory is not added to.
        self._fetcher = ModelFetcher(member, source, settings.seeds) if isinstance(source, ContentStore) else None
        self._use: AbstractContextManager[None] | None = None
        self._manifest = holdings.manifest
        self._on_selected = on_selected  # told how many experts are to be held

    def close(self) -> None:
        """What is held is no longer in use: others may evict it."""
        if self._use is not None:
            self._use.__exit__(None, None, None)
            self._use = None

    async def first_pass(self) -> list[ShardEntry]:
        """Hold what can be had now; returns what could not. Raises ConfigError, DiskFull, StorageError."""
        if self._settings.publish is not None:
            await self._verify_whole(self._settings.publish)
            return []
        wanted = await self._placement.first()
        self._tell(wanted)
        if self._fetcher is None:
            await asyncio.to_thread(self._holdings.verify, wanted)  # which names what is missing
            return []
        with self._holdings.loading():
            await self._keep(wanted)
            return await self._get(self._fetcher, wanted, FIRST_TRY)

    async def maintain(self, left: list[ShardEntry]) -> None:
        """Fetch what is left as soon as somebody can supply it, unless this machine's disk fails.

        Where the choice is this node's, follow what the swarm lacks, for ever.
        """
        follows = self._placement.follows
        if follows:  # whether an expert that nobody could supply is still worth it, is seen anew
            left = [shard for shard in left if shard.expert_key is None]
        while left or follows:
            await asyncio.sleep(LOOK_EVERY * random.uniform(1 - _JITTER, 1 + _JITTER))
            try:
                left = await self._try_again(left)
                if follows and (change := await self._placement.look(self._holdings.experts)):
                    await self._make(change)
            except StorageError as error:  # what is held already is served all the same
                if not follows:
                    _log.error("no more shards are fetched", left=len(left), reason=str(error))
                    return
                _log.warning("what the swarm lacks cannot be stored here now", reason=str(error))

    async def verify_all(self) -> None:
        """Check, in the background, every file of a whole converted directory, so that it can be offered as a seed."""
        if self._fetcher is None and all(self._source.path(shard.hash) is not None for shard in self._manifest.shards):
            await asyncio.to_thread(self._holdings.verify_seed)

    # --- parts ----------------------------------------------------------------------------------------------------

    async def _try_again(self, left: list[ShardEntry]) -> list[ShardEntry]:
        if not left:
            return left
        assert self._fetcher is not None
        with self._holdings.loading():
            return await self._get(self._fetcher, left, 0.0)

    async def _verify_whole(self, publishing: Publishing) -> None:
        self._on_selected(len(self._manifest.experts))
        await to_its_end(self._holdings.verify_seed, publishing.on_verified)
        if not self._holdings.complete:
            raise CorruptShard(f"{self._settings.model} is damaged or not complete, and cannot be published")

    async def _make(self, change: Change) -> None:
        """Leave first: what is fetched may need the room."""
        experts = self._manifest.experts
        _log.info("the swarm has changed: so does what is held here", take=len(change.take), leave=len(change.leave))
        taken = [experts[key] for key in change.take]
        self._holdings.leave(experts[key] for key in change.leave)
        stay = [experts[key] for key in self._holdings.experts]
        self._tell([*stay, *taken])
        if self._fetcher is None:
            await asyncio.to_thread(self._holdings.verify, taken)
            return
        with self._holdings.loading():
            skeleton = self._manifest.skeleton if self._settings.skeleton else ()
            await self._keep([*stay, *taken, *skeleton])
            await self._get(self._fetcher, taken, 0.0)

    def _tell(self, wanted: Iterable[ShardEntry]) -> None:
        self._on_selected(sum(shard.expert_key is not None for shard in wanted))

    async def _keep(self, wanted: Iterable[ShardEntry]) -> None:
        """These are in use from now on, and nothing else. Raises StorageError."""
        assert self._fetcher is not None
        use = self._fetcher.store.keeping.use([ShardHash(self._manifest.model_id), *(shard.hash for shard in wanted)])
        await to_its_end(use.__enter__)
        self.close()
        self._use = use

    async def _get(self, fetcher: ModelFetcher, wanted: Sequence[ShardEntry], timeout: float) -> list[ShardEntry]:
        """Hold shards, from the disk where they are there; returns what nobody could supply. Raises StorageError."""
        here = [shard for shard in wanted if self._source.path(shard.hash) is not None]
        await asyncio.to_thread(self._holdings.verify, here)
        left = [shard for shard in wanted if self._source.path(shard.hash) is None]  # corrupt ones too
        return await self._fetch(fetcher, left, timeout)

    async def _fetch(self, fetcher: ModelFetcher, shards: Sequence[ShardEntry], timeout: float) -> list[ShardEntry]:
        """Fetch and hold; returns what nobody could supply. `timeout`: seconds to wait for suppliers, once for all."""
        entries = {shard.hash: shard for shard in shards}
        done = 0

        def fetched(what: Wanted, path: Path) -> None:
            nonlocal done
            done += 1
            self._holdings.add(entries[what.hash])
            _log.info("shard fetched", file=what.name, number=done, of=len(entries))

        failures = await fetcher.fetch(self._manifest, shards, timeout=timeout, on_done=fetched)
        for object_hash, error in failures.items():
            file = entries[object_hash].file
            _log.warning("shard not available yet; trying again later", file=file, reason=str(error))
        return [entries[object_hash] for object_hash in failures]
