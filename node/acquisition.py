"""Getting what a node is to hold: chosen by the settings, verified where it lies, or fetched from the swarm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import ShardEntry
from moehive.swarm.directory import Holders
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.model_fetcher import ModelFetcher
from moehive.swarm.policy.budgets import ExpertForms
from moehive.swarm.policy.placement import choose_experts, rarest_first
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.store.content import ContentStore
from moehive.swarm.threads import to_its_end
from moehive.swarm.transfer.sources import Wanted

from .holdings import Holdings
from .selection import AUTO, parse_selection
from .settings import NodeSettings, Publishing

FIRST_TRY = 10.0  # seconds of waiting for somebody who can supply what is missing, before the node starts without it
TRY_AGAIN = 30.0  # seconds between attempts to get what nobody could supply
_log = get_logger(__name__)


class Acquisition:
    """Fills `holdings`. `first_pass` gets what can be had now, `keep_trying` the rest."""

    def __init__(
        self,
        settings: NodeSettings,
        member: Member,
        source: ObjectSource,
        holdings: Holdings,
        *,
        ram_budget: int,
        forms: ExpertForms,
        on_selected: Callable[[int], None] = lambda experts: None,
    ) -> None:
        self._settings = settings
        self._member = member
        self._source = source
        self._holdings = holdings
        # A converted directory is not added to.
        self._fetcher = ModelFetcher(member, source, settings.seeds) if isinstance(source, ContentStore) else None
        self._uses = ExitStack()
        self._manifest = holdings.manifest
        self._ram_budget = ram_budget  # bytes
        self._forms = forms  # of one expert in memory: quantised ones grow where they are computed with
        self._on_selected = on_selected  # told how many experts are to be held

    def close(self) -> None:
        """What is held is no longer in use: others may evict it."""
        self._uses.close()

    async def first_pass(self) -> list[ShardEntry]:
        """Hold what can be had now; returns what could not. Raises ConfigError, DiskFull, StorageError."""
        if self._settings.publish is not None:
            await self._verify_whole(self._settings.publish)
            return []
        if self._fetcher is None:
            await asyncio.to_thread(self._holdings.verify, await self._choose())  # which names what is missing
            return []
        with self._holdings.loading():
            wanted = await self._choose()
            objects = [ShardHash(self._manifest.model_id), *(shard.hash for shard in wanted)]
            await to_its_end(self._uses.enter_context, self._fetcher.store.keeping.use(objects))
            here = [shard for shard in wanted if self._source.path(shard.hash) is not None]
            await asyncio.to_thread(self._holdings.verify, here)
            left = [shard for shard in wanted if self._source.path(shard.hash) is None]  # corrupt ones too
            return await self._fetch(self._fetcher, left, FIRST_TRY)

    async def keep_trying(self, left: list[ShardEntry]) -> None:
        """Fetch what is left as soon as somebody can supply it; gives up where this machine's disk does."""
        while left:
            assert self._fetcher is not None
            await asyncio.sleep(TRY_AGAIN)
            try:
                with self._holdings.loading():
                    left = await self._fetch(self._fetcher, left, 0.0)
            except StorageError as error:  # what is held already is served all the same
                _log.error("no more shards are fetched", left=len(left), reason=str(error))
                return

    async def verify_all(self) -> None:
        """Check, in the background, every file of a whole converted directory, so that it can be offered as a seed."""
        if self._fetcher is None and all(self._source.path(shard.hash) is not None for shard in self._manifest.shards):
            await asyncio.to_thread(self._holdings.verify_seed)

    async def _verify_whole(self, publishing: Publishing) -> None:
        self._on_selected(len(self._manifest.experts))
        await to_its_end(self._holdings.verify_seed, publishing.on_verified)
        if not self._holdings.complete:
            raise CorruptShard(f"{self._settings.model} is damaged or not complete, and cannot be published")

    async def _choose(self) -> list[ShardEntry]:
        """What is to be held: first what the swarm lacks most, and what others who load now do not begin with."""
        selected = await self._select()
        self._on_selected(len(selected))
        replicas = self._member.directory(self._manifest.model_id).holders.replicas
        order = rarest_first(selected, replicas, seed=self._member.transport.peer)
        experts = [self._manifest.experts[key] for key in order]
        return [*experts, *self._manifest.skeleton] if self._settings.skeleton else experts

    async def _select(self) -> frozenset[ExpertKey]:
        if self._settings.experts != AUTO:
            return parse_selection(self._settings.experts, self._manifest.model)
        directory = self._member.directory(self._manifest.model_id)
        try:
            await directory.refresh()
        except TimeoutError:
            _log.warning("nobody could be asked who holds what; choosing by what is known")
        budgets = [self._ram_budget]
        if self._fetcher is not None:
            budgets.append(await asyncio.to_thread(self._disk_for_experts, self._fetcher.store))
        sizes, forms = dict(self._obtainable(directory.holders)), self._forms
        return choose_experts(
            sizes,
            directory.holders.replicas,
            budgets=budgets,
            widened=forms.widened,
            stored=min(forms.stored, forms.widened),
            reserve=forms.floor * forms.widened,
            seed=self._member.transport.peer,
        )

    def _disk_for_experts(self, store: ContentStore) -> int:
        """Bytes that experts may take of the disk budget: what they take already, and what is free beyond the skeleton.

        Other models' objects stay: nothing is deleted for a choice that we make ourselves.
        """
        held = store.objects()
        experts = sum(shard.size for shard in self._manifest.experts.values() if shard.hash in held)
        missing = [shard for shard in self._manifest.skeleton if self._settings.skeleton and shard.hash not in held]
        free = self._settings.disk - store.usage().used_bytes - sum(shard.size for shard in missing)
        return max(0, experts + free)

    def _obtainable(self, holders: Holders) -> Iterator[tuple[ExpertKey, int]]:
        """The experts that are here or that a peer or a seed can supply, with their bytes on disk."""
        for key, shard in self._manifest.experts.items():
            here = self._source.path(shard.hash) is not None
            if shard.group is None and (here or holders.suppliers(shard) or self._member.seeds.sources(shard.hash)):
                yield key, shard.size

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
