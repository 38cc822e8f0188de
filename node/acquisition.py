"""Getting what a node is to hold: chosen by the settings, verified where it lies, or fetched from the swarm."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ShardEntry
from moehive.swarm.directory import Holders
from moehive.swarm.fetch import Fetcher
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.policy.placement import fill_budget
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore

from .holdings import Holdings
from .selection import AUTO, parse_selection
from .settings import NodeSettings

FIRST_TRY = 10.0  # seconds per shard before the node starts without it
TRY_AGAIN = 30.0  # seconds between attempts to get what nobody could supply
_log = get_logger(__name__)


class Acquisition:
    """Fills `holdings`. `first_pass` gets what can be had now, `keep_trying` the rest."""

    def __init__(
        self, settings: NodeSettings, member: Member, source: ObjectSource, holdings: Holdings, ram_budget: int
    ) -> None:
        self._settings = settings
        self._member = member
        self._source = source
        self._holdings = holdings
        self._manifest = holdings.manifest
        self._ram_budget = ram_budget  # bytes

    async def first_pass(self) -> list[ShardEntry]:
        """Hold what can be had now; returns what could not. Raises ConfigError, DiskFull, StorageError."""
        wanted = [self._manifest.experts[key] for key in sorted(await self._select())]
        if self._settings.skeleton:
            wanted += self._manifest.skeleton
        here = [shard for shard in wanted if self._source.path(shard.hash) is not None]
        await asyncio.to_thread(self._holdings.verify, here)
        left = [shard for shard in wanted if self._source.path(shard.hash) is None]
        return await self._fetch(left, FIRST_TRY)

    async def keep_trying(self, left: list[ShardEntry]) -> None:
        """Fetch what is left as soon as somebody can supply it."""
        while left:
            await asyncio.sleep(TRY_AGAIN)
            left = await self._fetch(left, 0.0)

    async def verify_all(self) -> None:
        """Check, in the background, every file of a whole converted directory, so that it can be offered as a seed."""
        if isinstance(self._source, ContentStore):
            return
        if all(self._source.path(shard.hash) is not None for shard in self._manifest.shards):
            await asyncio.to_thread(self._holdings.verify_seed)

    async def _select(self) -> frozenset[ExpertKey]:
        if self._settings.experts != AUTO:
            return parse_selection(self._settings.experts, self._manifest.model)
        directory = self._member.directory(self._manifest.model_id)
        await directory.refresh()
        budget = self._ram_budget
        if isinstance(self._source, ContentStore):
            budget = min(budget, self._settings.disk)
        return fill_budget(
            self._obtainable(directory.holders),
            directory.holders.replicas,
            budget=budget,
            seed=self._member.transport.peer,
        )

    def _obtainable(self, holders: Holders) -> dict[ExpertKey, int]:
        """Sizes of the experts that are here or that somebody can supply."""
        return {
            key: shard.size
            for key, shard in self._manifest.experts.items()
            if shard.group is None and (self._source.path(shard.hash) is not None or holders.suppliers(shard))
        }

    async def _fetch(self, shards: Sequence[ShardEntry], timeout: float) -> list[ShardEntry]:
        if not isinstance(self._source, ContentStore):
            return []  # a converted directory is not added to; `Holdings.verify` has named what is missing
        directory = self._member.directory(self._manifest.model_id)
        fetcher = Fetcher(self._member.shards, self._member.standings, self._source)
        left = []
        for number, shard in enumerate(shards, start=1):
            try:
                await fetcher.fetch(
                    shard.hash, partial(self._member.sources, directory, shard), name=shard.file, timeout=timeout
                )
            except ShardUnavailable as error:
                _log.warning("shard not available yet; trying again later", file=shard.file, reason=str(error))
                left.append(shard)
            else:
                self._holdings.add(shard)
                _log.info("shard fetched", file=shard.file, number=number, of=len(shards))
        return left
