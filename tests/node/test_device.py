"""A node that computes on a device: the processor stands for it, through the same code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.swarm_fakes import SECRET, identity, member

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.routing import group_by_expert
from moehive.node.compute import BatchRun, Work, run_batch
from moehive.node.serving import Serving
from moehive.node.settings import NodeSettings
from moehive.protocol.errors import BudgetTooSmall, ConfigError
from moehive.protocol.ids import ExpertKey
from moehive.swarm.announcer import Announcer
from moehive.swarm.dispatch.request import DTYPES, LayerInput, build_request
from moehive.swarm.member import Member
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.slots import ExpertLayout
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.accelerator import TorchAccelerator
from moehive.swarm.transport.memory import MemoryNetwork

F32 = torch.float32


@pytest.fixture(params=["floor", "half", "all"])
def slots(request: pytest.FixtureRequest, mixtral: ConvertedDirectory) -> int:
    model = mixtral.manifest.model
    experts = len(mixtral.manifest.experts)
    return {"floor": 2 * model.top_k + 1, "half": experts // 2, "all": experts}[request.param]


@pytest.fixture
def loader(mixtral: ConvertedDirectory) -> ExpertLoader:
    return ExpertLoader(mixtral.manifest, mixtral)


def slot_bytes(loader: ExpertLoader, dtype: torch.dtype = F32) -> int:
    return ExpertLayout.of(loader.manifest.model, dtype).nbytes


def work(loader: ExpertLoader, layer: int, tokens: int, form: str, seed: int, dtype: torch.dtype = F32) -> Work:
    generator = torch.Generator().manual_seed(seed)
    model = loader.manifest.model
    index = torch.stack([torch.randperm(model.num_experts, generator=generator)[: model.top_k] for _ in range(tokens)])
    hidden = torch.randn(tokens, model.hidden_size, generator=generator).to(dtype)
    call = LayerInput(layer, hidden, torch.rand(index.shape, generator=generator), form)
    request = build_request(loader.manifest.model_id, call, group_by_expert(index, model.num_experts), deadline=1.0)
    return Work.parse(request.message, bytearray(b"".join(request.payload)))


@pytest.mark.parametrize("slice_rows", [3, 1 << 30])
def test_answers_are_those_of_the_processor(loader: ExpertLoader, slots: int, slice_rows: int) -> None:
    plain = WeightsTier(loader, 1 << 30)
    device = DeviceExperts(
        loader, WeightsTier(loader, 1 << 30), TorchAccelerator.named("cpu"), F32, slots * slot_bytes(loader)
    )

    def lease(layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
        return plain.lease((ExpertKey(layer, expert), dtype))

    for seed in range(4):
        for layer in loader.manifest.model.moe_layers:
            batch = [
                work(loader, layer, tokens, form, 10 * seed + number)
                for number, (tokens, form) in enumerate([(1, "sum"), (7, "rows"), (4, "sum"), (1, "rows")])
            ][seed % 3 :]
            here, there = (
                BatchRun(batch, lease, loader.spec, slice_rows=slice_rows, device=one) for one in (None, device)
            )
            for run in (here, there):
                while not run.advance():
                    pass
            for one, wanted, found in zip(batch, here.outputs, there.outputs, strict=True):
                if one.merges:
                    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(found, wanted)
    stats = device.device_stats
    assert stats.hits > 0
    assert stats.loads > 0
    assert stats.resident_bytes <= slots * slot_bytes(loader)
    device.close()
    plain.close()


def serving(model: ConvertedDirectory, home: Path, us: Member, **settings: object) -> Serving:
    announcer = Announcer(us.transport, identity(2), SECRET, model.model_id)
    options = NodeSettings(str(model.root), home, **settings)  # type: ignore[arg-type]
    return Serving(options, us, model.manifest, model, announcer)


@pytest.fixture
async def us() -> AsyncIterator[Member]:
    async with member(MemoryNetwork(), 2) as one:
        yield one


async def test_a_node_says_what_its_device_holds(
    mixtral: ConvertedDirectory, tmp_path: Path, us: Member, loader: ExpertLoader
) -> None:
    dtype = loader_dtype(loader)
    node = serving(mixtral, tmp_path, us, ram=1 << 24, device="cpu", vram=6 * slot_bytes(loader, dtype))
    request = work(loader, mixtral.manifest.model.moe_layers[0], 3, "sum", 1, dtype)
    assert node._device is not None
    working = asyncio.create_task(node._worker.run())
    found = (await node._worker.submit(request, 100, identity(3).peer)).output
    working.cancel()
    wanted = run_batch([request], node._lease, loader.spec)[0]
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    said = node._facts().to_json()
    assert said["device"] == "cpu"
    assert [tier["tier"] for tier in said["experts"]["tiers"]] == ["vram", "ram", "disk"]
    vram = said["experts"]["tiers"][0]
    assert vram["misses"] > 0
    assert vram["budgetBytes"] <= 6 * slot_bytes(loader, dtype)
    node._device.close()


async def test_memory_of_the_device_counts_for_what_a_node_chooses_to_hold(
    mixtral: ConvertedDirectory, tmp_path: Path, us: Member, loader: ExpertLoader
) -> None:
    room = loader.largest_room(loader_dtype(loader))
    few, more = (
        serving(mixtral, tmp_path, us, ram=5 * room, experts="auto", **options)
        for options in ({}, {"device": "cpu", "vram": 6 * slot_bytes(loader, loader_dtype(loader))})
    )
    counts = [len(await node._acquisition._placement._select()) for node in (few, more)]
    assert counts[0] == 5
    assert counts[1] == 5 + 6 - 3  # uploads go through room for three
    assert more._device is not None
    more._device.close()


def loader_dtype(loader: ExpertLoader) -> torch.dtype:
    return DTYPES[loader.manifest.model.dtype]


async def test_a_device_that_is_not_here_is_refused(mixtral: ConvertedDirectory, tmp_path: Path, us: Member) -> None:
    with pytest.raises(ConfigError, match="torch finds no device 'cuda:7' here"):
        serving(mixtral, tmp_path, us, ram=1 << 24, device="cuda:7")
    with pytest.raises(BudgetTooSmall, match="cpu memory for experts"):
        serving(mixtral, tmp_path, us, ram=1 << 24, device="cpu", vram=100)


async def test_quantised_experts_of_a_node_stay_quantised(checkpoints: Checkpoints, tmp_path: Path, us: Member) -> None:
    model = ConvertedDirectory(checkpoints.converted("deepseek_v3_fp8"))
    loader, experts = ExpertLoader(model.manifest, model), len(model.manifest.experts)
    room = max(loader.stored_room(key) for key in model.manifest.experts)
    least = (2 * loader.top_k + 2) * loader.widened_room(loader_dtype(loader))
    node = serving(model, tmp_path, us, ram=experts * room + least)
    node._tier.hold_stored(loader_dtype(loader), experts, uploads=True)
    stored = node._tier.stored_stats
    assert stored is not None
    assert stored.budget_bytes >= experts * room
    for key in model.manifest.experts:
        with node._lease(*key, loader_dtype(loader)) as weights:
            assert weights.gate_up.dtype == loader_dtype(loader)
    assert node._tier.stored.stats.entries == experts
    assert [tier["tier"] for tier in node._facts().to_json()["experts"]["tiers"]] == ["ram", "ram-stored", "disk"]
    node._tier.close()
