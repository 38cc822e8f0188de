"""One model of a joined swarm, seen from a client: who is asked for its experts, and which of them are kept here."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from moehive.protocol.errors import BudgetTooSmall
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.model.backend import ExpertLoader, weights_tier
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.tasks import start_on, task_group

from .backend import SwarmExperts
from .caller import CallSettings, ExpertCaller
from .resident import ResidentExperts
from .weights import SwarmWeights

if TYPE_CHECKING:
    from moehive.swarm.member import Member


class SwarmModel:
    """Made on the event loop; `run()` looks after peers and fetches in the background, until cancelled.

    `ram` is the budget in bytes for experts that are kept here; 0: none. Raises BudgetTooSmall where it holds not even
    one.
    """

    def __init__(
        self, manifest: Manifest, member: Member, source: ObjectSource, settings: CallSettings, *, ram: int = 0
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._member = member
        self._directory = member.directory(manifest.model_id)
        self._num_experts = manifest.model.num_experts
        loader = ExpertLoader(manifest, source)
        self.weights = SwarmWeights(manifest, loader, self._fetch)
        self.caller = ExpertCaller(
            manifest.model_id,
            self._directory,
            member,
            member.standings,
            settings,
            last_resort=self.weights.compute,
        )
        self.resident: ResidentExperts | None = None
        if ram:
            largest = max(shard.size for shard in manifest.experts.values())
            if ram < largest:  # what is not kept is computed by peers: one is enough
                raise BudgetTooSmall("experts kept by this client", budget=ram, needed=largest)
            self.resident = ResidentExperts(manifest, self.weights, weights_tier(loader, ram))

    async def run(self) -> None:
        """Everything that goes on beside the calls."""
        async with task_group() as group:
            group.create_task(self.caller.watch(), name="watch peers")
            if self.resident is not None:
                group.create_task(self.resident.run(), name="fetch what pays")

    def backend(self, form: str) -> SwarmExperts:
        """What computes the routed experts of a transformers model, on other threads."""
        start_soon = partial(start_on, self._loop)
        return SwarmExperts(self.caller, start_soon, self._num_experts, form=form, resident=self.resident)

    async def _fetch(self, shard: ShardEntry, buffer: memoryview, deadline: float) -> None:
        wanted = self._member.wanted(self._directory, shard)
        left = max(deadline - time.monotonic(), 0.0)
        await self._member.downloads.fetch_to_memory(wanted, buffer, deadline=left)
