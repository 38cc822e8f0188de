"""Experts that come from the swarm: within the RAM budget from their first byte on."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.swarm_fakes import fetch_from
from support.waiting import until

from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.routing import group_by_expert
from moehive.protocol.errors import BudgetTooSmall, MoehiveError, ShardUnavailable
from moehive.protocol.ids import ExpertKey
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.dispatch.resident import ResidentExperts, _LayerCounts
from moehive.swarm.dispatch.weights import SwarmWeights
from moehive.swarm.model import buffers
from moehive.swarm.model.buffers import HostBuffers
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory

DEADLINE = 20.0  # seconds; reached only by a test that fails
EXPERTS = 4


@pytest.fixture(autouse=True)
def every_buffer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 1)


class Watched(HostBuffers):
    """Remembers the most bytes that its buffers had at any moment, in use or free."""

    peak = 0

    def _take(self, size: int) -> NDArray[Any]:
        memory = super()._take(size)
        self.peak = max(self.peak, self.taken_bytes)
        return memory


class Client:
    """What a client keeps of `model`, with room for so many experts. Downloads fail as `failing` says, by number."""

    def __init__(
        self, model: ConvertedDirectory, room: float, dtype: torch.dtype, failing: frozenset[int] = frozenset()
    ) -> None:
        self.loader = ExpertLoader(model.manifest, model)
        self.buffers = self.loader.buffers = Watched()
        self.budget = int(room * self.loader.largest_room(dtype))
        self.tier = WeightsTier(self.loader, self.budget)
        self.dtype, self.downloads = dtype, 0

        def fails() -> bool:
            self.downloads += 1
            return self.downloads in failing

        self.weights = SwarmWeights(model.manifest, self.loader, fetch_from(model, fails), self.tier)
        self.resident = ResidentExperts(model.manifest, self.weights, self.tier)
        self.resident._dtype = dtype
        self.hidden = torch.randn(1, model.manifest.model.hidden_size).to(dtype)
        self._experts = model.manifest.model.num_experts

    async def keep(self, expert: int) -> None:
        self.resident._layers.setdefault(0, _LayerCounts())
        await self.resident._fetch(ExpertKey(0, expert))

    async def compute(self, expert: int) -> torch.Tensor:
        call = LayerInput(0, self.hidden, torch.ones(1, 1), "rows")
        share = group_by_expert(torch.tensor([[expert]]), self._experts)
        (part,) = await self.weights.compute(call, share, time.monotonic() + DEADLINE)
        return part.output

    async def use(self, expert: int) -> None:
        """As the model's thread does: what is here is used while others fetch."""
        lease = self.tier.try_lease((ExpertKey(0, expert), self.dtype))
        if lease is not None:
            with lease:
                await asyncio.sleep(0.001)


OPERATIONS = st.tuples(
    st.sampled_from(["keep", "compute", "use"]), st.integers(0, EXPERTS - 1), st.sampled_from([False, False, True])
)


@settings(max_examples=30, deadline=None)
@given(
    rounds=st.lists(st.lists(OPERATIONS, min_size=1, max_size=5), min_size=1, max_size=6),
    room=st.sampled_from([1, 1.5, 2, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    failing=st.frozensets(st.integers(1, 12), max_size=4),
)
def test_all_that_a_client_has_of_experts_is_within_its_budget(
    mixtral: ConvertedDirectory,
    rounds: list[list[tuple[str, int, bool]]],
    room: float,
    dtype: torch.dtype,
    failing: frozenset[int],
) -> None:
    """What is kept, what is being downloaded, what is made of it, and what is computed with; some are cancelled."""
    client = Client(mixtral, room, dtype, failing)

    async def run() -> None:
        for operations in rounds:
            tasks = [asyncio.create_task(getattr(client, kind)(expert)) for kind, expert, _ in operations]
            await asyncio.sleep(0)
            for task, (*_, cancelled) in zip(tasks, operations, strict=True):
                if cancelled:
                    task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                assert found is None or isinstance(found, torch.Tensor | MoehiveError | asyncio.CancelledError), found
            assert client.tier.stats.reserved_bytes == 0
            assert client.tier.resident_bytes <= client.budget

    asyncio.run(run())
    assert client.buffers.peak <= client.budget
    client.resident.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_what_nobody_computes_is_computed_here_in_room_of_the_budget(
    mixtral: ConvertedDirectory, dtype: torch.dtype
) -> None:
    client = Client(mixtral, 1, dtype)
    await client.keep(0)
    assert client.tier.keys() == [(ExpertKey(0, 0), dtype)]
    loader = ExpertLoader(mixtral.manifest, mixtral)
    wanted = expert_ffn(client.hidden, loader.load(ExpertKey(0, 1), dtype), loader.spec)
    assert torch.equal(await client.compute(1), wanted)
    assert client.tier.keys() == []  # it made way
    assert 0 < client.buffers.peak <= client.budget
    client.resident.close()


async def test_room_that_is_in_use_is_waited_for(mixtral: ConvertedDirectory) -> None:
    client = Client(mixtral, 1, torch.float32)
    await client.keep(0)
    lease = client.tier.try_lease((ExpertKey(0, 0), torch.float32))
    assert lease is not None
    with lease:
        computing = asyncio.create_task(client.compute(1))
        await asyncio.sleep(0.05)
        assert client.downloads == 1
    await computing
    with pytest.raises(BudgetTooSmall) as caught:  # without waiting for what will never be
        async with client.weights.load(ExpertKey(0, 1), torch.float64, math.inf):
            pass
    assert caught.value.needed == client.loader.room(ExpertKey(0, 1), torch.float64)
    assert client.downloads == 2
    client.resident.close()


async def test_room_is_given_back_when_the_thread_that_uses_it_has_ended(mixtral: ConvertedDirectory) -> None:
    client, started, go_on = Client(mixtral, 1, torch.float32), threading.Event(), threading.Event()
    widen = client.loader.widen

    def slow(*arguments: Any) -> ExpertWeights:
        started.set()
        assert go_on.wait(DEADLINE)
        return widen(*arguments)

    client.loader.widen = slow  # type: ignore[method-assign]
    keeping = asyncio.create_task(client.keep(0))
    await until(started.is_set)
    keeping.cancel()
    await asyncio.sleep(0.02)
    assert client.tier.stats.reserved_bytes == client.budget
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    assert client.tier.stats.reserved_bytes == 0
    client.resident.close()


async def test_a_fetch_that_finds_no_room_in_time_is_given_up(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(mixtral, 1, torch.float32)
    monkeypatch.setattr("moehive.swarm.dispatch.resident.FETCH_TIMEOUT", 0.0)
    await client.keep(0)
    lease = client.tier.try_lease((ExpertKey(0, 0), torch.float32))
    assert lease is not None
    with lease:
        assert not await client.resident._fetch(ExpertKey(0, 1))
    failing = Client(mixtral, 1, torch.float32, frozenset([1]))
    assert not await failing.resident._fetch(ExpertKey(0, 1))
    assert failing.tier.stats.reserved_bytes == 0
    failing.downloads = 0
    with pytest.raises(ShardUnavailable):
        await failing.compute(1)
    for each in (client, failing):
        each.resident.close()
