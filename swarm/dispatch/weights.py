"""Experts of the swarm in this machine's memory: fetched, verified, and computed with.

For what nobody can be asked to compute, for proving who computes wrongly, and for the experts that a client keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import torch

from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.routing import Assignment
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.model.loader import ExpertLoader

from .request import LayerInput, Part

# The whole shard, verified, into a buffer of its size, by the deadline (the clock's seconds); raises ShardUnavailable.
FetchShard = Callable[[ShardEntry, memoryview, float], Awaitable[None]]


class SwarmWeights:
    """Experts of one model, as they are computed with. Lives on the event loop."""

    def __init__(self, manifest: Manifest, loader: ExpertLoader, fetch: FetchShard) -> None:
        self._manifest = manifest
        self._loader = loader
        self._fetch = fetch
        self._buffer = bytearray()  # kept: fresh memory costs more than verifying what is read into it
        self._turn = asyncio.Lock()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of one expert in memory."""
        return self._loader.nbytes(dtype)

    async def load(self, key: ExpertKey, dtype: torch.dtype, deadline: float) -> ExpertWeights:
        """One expert's weights. Raises ShardUnavailable, ManifestError."""
        shard = self._manifest.experts[key]
        async with self._turn:
            if len(self._buffer) != shard.size:
                self._buffer = bytearray(shard.size)
            await self._fetch(shard, memoryview(self._buffer), deadline)
            return await asyncio.to_thread(self._from_bytes, key, dtype)

    def _from_bytes(self, key: ExpertKey, dtype: torch.dtype) -> ExpertWeights:
        return self._loader.widen(key, self._loader.from_bytes(key, self._buffer), dtype)

    def part(self, call: LayerInput, assignment: Assignment, weights: ExpertWeights) -> Part:
        """One expert's part of a layer call, as a peer would have answered it."""
        inputs = call.hidden[assignment.token].to(weights.gate_up.device)  # [R, H]
        rows = expert_ffn(inputs, weights, self._loader.spec).to(call.hidden.device)  # [R, H]
        if call.form == "rows":
            return Part((assignment,), None, rows)
        weight = call.top_k_weights[assignment.token, assignment.position, None]  # [R, 1]
        return Part((assignment,), assignment.token, rows.float() * weight.float())

    async def compute(self, call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
        """The outputs of `share`, computed here (see caller.LastResort). Raises ShardUnavailable, ManifestError."""
        parts = []
        for assignment in share:
            weights = await self.load(ExpertKey(call.layer, assignment.expert), call.hidden.dtype, deadline)
            parts.append(await asyncio.to_thread(self.part, call, assignment, weights))
        return parts
