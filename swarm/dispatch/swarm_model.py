"""One model of a joined swarm, seen from a client: who is asked for its experts, and which of them are kept here."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from moehive.protocol.errors import BudgetTooSmall, ConfigError
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.memory import default_vram_budget
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.base import ObjectSource
from moehive.swarm.tasks import check_not_forked, start_on, task_group
from moehive.swarm.tiers.accelerator import Accelerator

from .backend import SwarmExperts
from .caller import CallSettings, ExpertCaller
from .request import DTYPES
from .resident import ResidentExperts
from .weights import SwarmWeights

if TYPE_CHECKING:
    import torch

    from moehive.swarm.member import Member

R = TypeVar("R")


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
        self.ram = ram
        self._name = manifest.model.name
        self._directory = member.directory(manifest.model_id)
        self._num_experts = manifest.model.num_experts
        self._experts = manifest.experts
        loader = self._loader = ExpertLoader(manifest, source)
        tier = self._tier_of(manifest, ram) if ram else None
        self.weights = SwarmWeights(manifest, loader, self._fetch, tier)
        self.caller = ExpertCaller(
            manifest.model_id,
            self._directory,
            member,
            member.standings,
            settings,
            last_resort=self.weights.compute,
        )
        self.resident: ResidentExperts | None = None
        self._kept_on: tuple[str, int] | None = None  # and in how many bytes of it
        if tier is not None:
            self.resident = ResidentExperts(manifest, self.weights, tier)

    def _tier_of(self, manifest: Manifest, ram: int) -> WeightsTier:
        """What is not kept is computed by peers: one expert is enough."""
        largest = self._loader.largest_room(DTYPES[manifest.model.dtype])
        if ram < largest:
            raise BudgetTooSmall("experts kept by this client", budget=ram, needed=largest)
        return WeightsTier(self._loader, ram)

    async def run(self) -> None:
        """Everything that goes on beside the calls."""
        try:
            async with task_group() as group:
                group.create_task(self.caller.watch(), name="watch peers")
                if self.resident is not None:
                    group.create_task(self.resident.run(), name="fetch what pays")
        finally:
            if self.resident is not None:
                self.resident.close()

    def check_device(self, accelerator: Accelerator | None, vram: int | None) -> None:
        """Raise ConfigError where experts are kept on another device already (None: the processor), or in other than
        `vram` bytes of it.
        """
        if self._kept_on is None:
            return
        device, budget = self._kept_on
        asked = "cpu" if accelerator is None else str(accelerator.device)
        if asked != device or vram not in (None, budget):
            raise ConfigError(
                f"experts of {self._name} are kept with device={device!r} and vram={budget} already, not {asked!r} and "
                f"{vram}: all loads of a model in one swarm share that memory; leave device and vram out, or join anew"
            )

    def keep_on(self, accelerator: Accelerator, dtype: torch.dtype, vram: int | None) -> None:
        """Keep experts that are kept here on a device, too, in `vram` bytes (None: what is free there).

        Only for the first of several loads. Raises BudgetTooSmall.
        """
        if self.resident is not None and self.resident.device_stats is None:
            budget = default_vram_budget(accelerator.device) if vram is None else vram
            # Rows of each expert go back to be added to those of peers, so torch's products compute them one by one.
            experts = DeviceExperts(self._loader, self.resident.tier, accelerator, dtype, budget, kernels=False)
            self.resident.use_device(experts)
            self._kept_on = str(accelerator.device), budget

    def missing(self) -> int:
        """How many experts no peer announces now, neither to compute with nor to fetch."""
        holders = self._directory.holders
        if any(inventory.complete for inventory in holders.inventories.values()):
            return 0
        return len(self._experts.keys() - holders.by_expert.keys())

    def backend(self, form: str) -> SwarmExperts:
        """What computes the routed experts of a transformers model, on other threads."""
        return SwarmExperts(
            self.caller, partial(_start, os.getpid(), self._loop), self._num_experts, form=form, resident=self.resident
        )

    async def _fetch(self, shard: ShardEntry, buffer: memoryview, deadline: float) -> None:
        wanted = self._member.wanted(self._directory, shard)
        left = max(deadline - time.monotonic(), 0.0)
        await self._member.downloads.fetch_to_memory(wanted, buffer, deadline=left)


def _start(
    process: int, loop: asyncio.AbstractEventLoop, work: Callable[..., Coroutine[Any, Any, R]], *arguments: Any
) -> Future[R]:
    check_not_forked(process)
    return start_on(loop, work, *arguments)
