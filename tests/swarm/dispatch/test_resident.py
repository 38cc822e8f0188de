"""What a client that keeps experts tells about them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.swarm_fakes import Clock, fetch_from
from support.waiting import until

from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.kernels.routing import group_by_expert
from moehive.protocol.ids import ExpertKey
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.dispatch.resident import FIRST_RATE, ResidentExperts
from moehive.swarm.dispatch.weights import Fetched, SwarmWeights
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.slots import ExpertLayout
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.base import NotHeld
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.accelerator import TorchAccelerator

KEY = ExpertKey(0, 1)


class Weights:
    """Every expert comes after a quarter of a second."""

    def __init__(self, clock: Clock, tier: WeightsTier) -> None:
        self._clock = clock
        self.tier = tier

    @asynccontextmanager
    async def load(self, key: ExpertKey, dtype: torch.dtype, deadline: float) -> AsyncIterator[Fetched]:
        self._clock.now += 0.25
        with self.tier.incoming((key, dtype)) as room:
            yield Fetched([ExpertWeights(torch.zeros(8, 4), torch.zeros(4, 4))], room)


async def test_a_use_that_a_peer_computes_is_a_miss_and_a_fetch_is_a_load(mixtral: ConvertedDirectory) -> None:
    clock = Clock(0.0)
    tier = WeightsTier(ExpertLoader(mixtral.manifest, mixtral), 1 << 20)
    weights = cast(SwarmWeights, cast(Any, Weights(clock, tier)))
    resident = ResidentExperts(mixtral.manifest, weights, tier, clock=clock)

    assignments = group_by_expert(torch.tensor([[KEY.expert]]), mixtral.manifest.model.num_experts)

    def call() -> bool:
        lease = resident.lease(*KEY, torch.float32)
        if lease is not None:
            with lease:
                pass
        resident.saw(KEY.layer, assignments, 1, torch.float32, 0.0)
        return lease is not None

    assert not call()
    assert await resident._fetch(KEY)
    assert all([call(), call()])
    stats = resident.tier_stats
    size = 4 * (8 * 4 + 4 * 4)  # bytes in memory
    assert (stats.hits, stats.misses, stats.loads, stats.loaded_bytes) == (2, 1, 1, size)
    assert (stats.groups[0].hits, stats.groups[0].misses) == (2, 1)
    assert (stats.meter.every.calls, stats.meter.every.clean) == (3, 2)
    assert stats.meter.every.loads.slowest == stats.slowest_load == 0.25


@pytest.mark.parametrize(("expected", "fetched"), [(5000, {0, 1}), (700, set())])
def test_what_is_fetched_depends_on_how_many_tokens_are_to_come(
    mixtral: ConvertedDirectory, expected: int, fetched: set[int]
) -> None:
    """Fetching takes as long as some hundred tokens wait: of 700 there are 96 to come, of 5,000 enough."""
    loader = ExpertLoader(mixtral.manifest, mixtral)
    weights = cast(SwarmWeights, cast(Any, SimpleNamespace(nbytes=loader.nbytes)))
    resident = ResidentExperts(mixtral.manifest, weights, WeightsTier(loader, 2 * loader.nbytes(torch.float32)))
    resident.expect(expected)
    assignments = group_by_expert(torch.tensor([[0, 1]]), mixtral.manifest.model.num_experts)
    shard = max(shard.size for shard in mixtral.manifest.experts.values())
    wait = 2 * shard / FIRST_RATE / 300  # seconds for each token: the price of both experts in 300 tokens

    for _ in range(604):
        resident.saw(0, assignments, 1, torch.float32, wait)

    assert {key.expert for key in resident.worth_fetching()} == fetched


async def test_what_is_kept_and_used_is_computed_on_the_device_from_then_on(mixtral: ConvertedDirectory) -> None:
    """The processor stands for the device."""
    manifest, loader = mixtral.manifest, ExpertLoader(mixtral.manifest, mixtral)

    tier = WeightsTier(loader, 1 << 24)
    weights = SwarmWeights(manifest, loader, fetch_from(mixtral), tier)
    resident = ResidentExperts(manifest, weights, tier)
    slots = 2 * loader.top_k + 1
    budget = slots * ExpertLayout.of(manifest.model, torch.float32).nbytes
    accelerator = TorchAccelerator.named("cpu")
    resident.use_device(DeviceExperts(loader, tier, accelerator, torch.float32, budget, kernels=False))
    chosen = torch.tensor([[KEY.expert]])
    call = LayerInput(KEY.layer, torch.randn(1, manifest.model.hidden_size), torch.ones(1, 1), "rows")
    (assignment,) = group_by_expert(chosen, manifest.model.num_experts)

    def rows() -> torch.Tensor:
        resident.begin(KEY.layer, [assignment], 1, torch.float32)
        lease = resident.lease(*KEY, torch.float32)
        assert lease is not None
        with lease as found:
            part = resident.part(call, assignment, found)
        resident.saw(KEY.layer, [assignment], 1, torch.float32, 0.0)
        return part.output

    assert resident.lease(*KEY, torch.float32) is None
    resident.saw(KEY.layer, [assignment], 1, torch.float32, 0.0)  # a peer computed it
    assert await resident._fetch(KEY)
    wanted = expert_ffn(call.hidden, loader.load(KEY, torch.float32), loader.spec)
    assert torch.equal(rows(), wanted)
    await until(lambda: bool(resident.device_stats and resident.device_stats.entries))
    assert tier.evict((KEY, torch.float32))  # it need not be in RAM for it
    assert torch.equal(rows(), wanted)
    assert resident.device_stats is not None
    assert (resident.device_stats.hits, resident.device_stats.misses) == (1, 1)
    assert resident.tier_stats.entries == 0
    resident.close()


async def test_an_expert_stays_in_ram_until_it_is_on_the_device(mixtral: ConvertedDirectory) -> None:
    """A client has no disk to load it from again: without it, an upload would be a load that fails."""
    manifest, loader = mixtral.manifest, ExpertLoader(mixtral.manifest, mixtral)
    packing, go_on = threading.Event(), threading.Event()

    def read(key: ExpertKey) -> StoredExpert:
        raise NotHeld(manifest.experts[key].hash)

    tier = WeightsTier(loader, 1 << 24, read=read)
    slot = ExpertLayout.of(manifest.model, torch.float32).nbytes
    accelerator = TorchAccelerator.named("cpu")
    device = DeviceExperts(loader, tier, accelerator, torch.float32, 16 * slot, kernels=False)
    pack = device.tier._pack

    def held_up(key: ExpertKey, memory: torch.Tensor) -> None:
        packing.set()
        assert go_on.wait(60)
        pack(key, memory)

    device.tier._pack = held_up
    with tier.incoming((KEY, torch.float32)) as room:
        assert room is not None
        tier.put(room, loader.load(KEY, torch.float32), 0.1)
    device.upload(KEY, torch.float32)
    assert packing.wait(60)
    device.upload(KEY, torch.float32)  # which is on its way
    assert not tier.evict((KEY, torch.float32))
    go_on.set()
    await until(lambda: bool(device.device_stats.entries))
    await until(lambda: tier.evict((KEY, torch.float32)))
    device.upload(KEY, torch.float32)  # which is there
    device.upload(ExpertKey(0, 0), torch.float32)  # which is nowhere
    assert (device.device_stats.failed_loads, tier.stats.failed_loads) == (0, 0)
    device.close()


class Waiting:
    """A client whose tokens choose experts 0 and 1 of layer 0 and wait for them: the price of both in 300 tokens."""

    def __init__(self, model: ConvertedDirectory) -> None:
        loader = ExpertLoader(model.manifest, model)
        weights = cast(SwarmWeights, cast(Any, SimpleNamespace(nbytes=loader.nbytes)))
        tier = WeightsTier(loader, 2 * loader.nbytes(torch.float32))
        self.resident = ResidentExperts(model.manifest, weights, tier)
        self._assignments = group_by_expert(torch.tensor([[0, 1]]), model.manifest.model.num_experts)
        self._wait = 2 * max(shard.size for shard in model.manifest.experts.values()) / FIRST_RATE / 300  # seconds

    def decode(self, tokens: int) -> bool:
        """Whether experts are worth fetching after so many tokens."""
        for _ in range(tokens):
            self.resident.saw(0, self._assignments, 1, torch.float32, self._wait)
        return bool(self.resident.worth_fetching())


@pytest.mark.parametrize(("tokens", "fetched"), [(5000, True), (200, False)])
def test_a_generation_says_how_many_tokens_are_to_come(mixtral: ConvertedDirectory, tokens: int, fetched: bool) -> None:
    client = Waiting(mixtral)
    with client.resident.generating(tokens):
        assert client.decode(100) is fetched


def test_a_generation_that_ended_early_is_not_waited_for(mixtral: ConvertedDirectory) -> None:
    client = Waiting(mixtral)
    with client.resident.generating(5000):
        pass
    with client.resident.generating(200):
        assert not client.decode(100)


def test_what_the_caller_knows_of_counts_beside_a_generation(mixtral: ConvertedDirectory) -> None:
    client = Waiting(mixtral)
    client.resident.expect(5000)
    with client.resident.generating(200):
        assert client.decode(100)


def test_generations_at_the_same_time_add_up(mixtral: ConvertedDirectory) -> None:
    client = Waiting(mixtral)
    with client.resident.generating(300):
        assert not client.decode(100)
        with client.resident.generating(300):
            assert client.decode(1)


def test_short_generations_without_end_fetch_at_last(mixtral: ConvertedDirectory) -> None:
    """Each alone is not worth it; after as much waiting as fetching would have cost, more of them are expected."""
    client = Waiting(mixtral)
    fetched = []
    for _ in range(12):
        with client.resident.generating(50):
            fetched.append(client.decode(50))
    assert not any(fetched[:4])
    assert fetched[-1]
