"""Experts of the swarm in this machine's memory: fetched, verified, and computed with.

For what nobody can be asked to compute, for proving who computes wrongly, and for the experts that a client keeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.routing import Assignment
from moehive.protocol.errors import BudgetTooSmall
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.tier import WeightsKey, WeightsTier
from moehive.swarm.threads import to_its_end
from moehive.swarm.tiers.leases import Claim
from moehive.swarm.tiers.loading import forget_frames

from .request import LayerInput, Part

# The whole shard, verified, into a buffer of its size, by the deadline (the clock's seconds); raises ShardUnavailable.
FetchShard = Callable[[ShardEntry, memoryview, float], Awaitable[None]]


_LOOK: Final = 0.01  # seconds between looks for room in the tier


@dataclass(frozen=True, slots=True)
class Fetched:
    """One expert, to be taken, and its room in the tier that it can be put into, where there is one."""

    made: list[ExpertWeights]
    room: Claim[WeightsKey] | None

    def take(self) -> ExpertWeights:
        """Its weights. Only once: who has them has to let go of them before its room is given back."""
        return self.made.pop()


class SwarmWeights:
    """Experts of one model, as they are computed with, one at a time. Lives on the event loop.

    With a `tier`, the memory that they take is part of its budget.
    """

    def __init__(
        self, manifest: Manifest, loader: ExpertLoader, fetch: FetchShard, tier: WeightsTier | None = None
    ) -> None:
        self._manifest = manifest
        self._loader = loader
        self._fetch = fetch
        self._tier = tier
        self._turn = asyncio.Lock()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert in memory."""
        return self._loader.nbytes(dtype)

    @asynccontextmanager
    async def load(self, key: ExpertKey, dtype: torch.dtype, deadline: float) -> AsyncIterator[Fetched]:
        """One expert's weights, as long as the context lasts, or kept from then on (RamTier.put).

        Raises ShardUnavailable, ManifestError; BudgetTooSmall where the tier has no room for it until the deadline.
        """
        async with self._turn, self._room(key, dtype, deadline) as room:
            held, made = [self._loader.shard_buffer(key)], list[ExpertWeights]()
            try:
                await self._fetch(self._manifest.experts[key], held[0].numpy().data, deadline)
                await to_its_end(self._widen, key, held, dtype, made)
                yield Fetched(made, room)
            except BaseException as error:
                forget_frames(error)  # a task keeps its error, with what its frames have
                raise
            finally:
                held.clear()
                made.clear()

    def _widen(self, key: ExpertKey, held: list[Tensor], dtype: torch.dtype, made: list[ExpertWeights]) -> None:
        """In lists: a thread's pool keeps arguments and results for a while, and that memory nobody would count."""
        made.append(self._loader.widen(key, self._loader.in_buffer(key, held.pop()), dtype))

    @asynccontextmanager
    async def _room(
        self, key: ExpertKey, dtype: torch.dtype, deadline: float
    ) -> AsyncIterator[Claim[WeightsKey] | None]:
        """What loading takes of the tier's budget, once it is there: nothing there is in use for long."""
        if self._tier is None:
            yield None
            return
        needed = self._loader.room(key, dtype)
        while True:
            with self._tier.incoming((key, dtype)) as room:
                if room is not None:
                    yield room
                    return
            if needed > self._tier.budget_bytes or time.monotonic() > deadline:
                raise BudgetTooSmall(f"{key}, to be fetched", budget=self._tier.budget_bytes, needed=needed)
            await asyncio.sleep(_LOOK)

    def part(self, call: LayerInput, assignment: Assignment, weights: ExpertWeights) -> Part:
        """One expert's part of a layer call, as a peer would have answered it."""
        inputs = call.hidden[assignment.token].to(weights.gate_up.device)  # [R, H]
        rows = expert_ffn(inputs, weights, self._loader.spec).to(call.hidden.device)  # [R, H]
        if call.form == "rows":
            return Part((assignment,), None, rows)
        weight = call.top_k_weights[assignment.token, assignment.position, None]  # [R, 1]
        return Part((assignment,), assignment.token, rows.float() * weight.float())

    def _part_of(self, call: LayerInput, assignment: Assignment, fetched: Fetched) -> Part:
        return self.part(call, assignment, fetched.take())

    async def compute(self, call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
        """The outputs of `share`, computed here (see caller.LastResort). Raises what `load` raises."""
        parts = []
        for assignment in share:
            key = ExpertKey(call.layer, assignment.expert)
            async with self.load(key, call.hidden.dtype, deadline) as fetched:
                parts.append(await to_its_end(self._part_of, call, assignment, fetched))
        return parts
