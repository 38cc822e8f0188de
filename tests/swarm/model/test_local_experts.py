"""The local backend in a running model: small budgets, threads, faults."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, CorruptShard, ExpertUnavailable, ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, ExpertFfn, Gate, Manifest
from moehive.swarm import open_local, routing_statistics
from moehive.swarm.model.backend import ExpertsBackend, LocalExperts
from moehive.swarm.model.buffers import SMALLEST
from moehive.swarm.model.loader import ExpertLoader, StoredExpert, spec_of
from moehive.swarm.model.seats import attach_backend
from moehive.swarm.model.tier import WeightsTier, is_out_of_memory
from moehive.swarm.store.base import NotHeld
from moehive.swarm.store.directory import ConvertedDirectory


def logits(model: Any, prompt: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=prompt).logits
    return found


def generate(model: Any, prompt: Tensor) -> Tensor:
    mask = torch.ones_like(prompt)
    found: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return found


class CountingLoader(ExpertLoader):
    loads = 0

    def read(self, key: ExpertKey) -> StoredExpert:
        self.loads += 1
        return super().read(key)


def test_a_budget_of_the_floor_changes_the_reads_and_not_the_result(converted: Path, prompt: Tensor) -> None:
    directory = ConvertedDirectory(converted)
    model = directory.manifest.model
    loader = CountingLoader(directory.manifest, directory)
    floor = (2 * model.top_k + 1) * loader.largest_room(torch.bfloat16)
    answers, loads, peaks = [], [], []
    for budget in (floor, 1 << 30):
        loader.loads = 0
        backend = LocalExperts(loader, WeightsTier(loader, budget))
        served, _ = open_local(converted, backend=backend)
        answers.append((logits(served, prompt), generate(served, prompt)))
        loads.append(loader.loads)
        peaks.append(backend.tier.stats)
        assert backend.tier.resident_bytes <= budget
    assert peaks[0].evictions > 0
    assert peaks[1].evictions == 0
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    all_experts = len(model.moe_layers) * model.num_experts
    assert loads[1] <= all_experts  # each is read at most once where there is room
    assert loads[0] > 2 * all_experts


def test_two_swapped_experts_change_the_logits(own_copy: Path, converted: Path, prompt: Tensor) -> None:
    """The control: equality elsewhere means something."""
    manifest = ConvertedDirectory(own_copy).manifest
    layer = manifest.model.moe_layers[0]
    swap = {ExpertKey(layer, 0): ExpertKey(layer, 1), ExpertKey(layer, 1): ExpertKey(layer, 0)}
    shards = tuple(replace(s, expert_key=swap.get(s.expert_key, s.expert_key)) for s in manifest.shards)  # type: ignore[arg-type]
    (own_copy / MANIFEST_NAME).write_bytes(replace(manifest, shards=shards).to_bytes())
    with pytest.raises(ManifestError, match="changed after the conversion"):
        open_local(own_copy)
    (own_copy / REPORT_NAME).unlink()
    wrong, right = (logits(open_local(path, dtype=torch.float32)[0], prompt) for path in (own_copy, converted))
    assert (wrong - right).abs().max() > 0.1


def test_a_budget_below_the_floor_is_refused_before_anything_is_computed(converted: Path) -> None:
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    needed = (2 * loader.top_k + 1) * loader.largest_room(torch.bfloat16)
    with pytest.raises(BudgetTooSmall) as caught:
        open_local(converted, ram=needed - 1)
    assert (caught.value.budget, caught.value.needed) == (needed - 1, needed)
    open_local(converted, ram=needed)


@pytest.mark.parametrize(
    ("error", "matters"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("unable to mmap 4096 bytes from file </shm>: Cannot allocate memory (12)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("Cannot allocate memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, matters: bool) -> None:
    assert is_out_of_memory(error) == matters


def test_where_memory_runs_out_generation_goes_on_with_less(converted: Path, prompt: Tensor) -> None:
    directory = ConvertedDirectory(converted)
    loader, wanted = ExpertLoader(directory.manifest, directory), generate(open_local(converted)[0], prompt)
    fail_at, loads = 9, 0

    def read(key: ExpertKey) -> StoredExpert:
        nonlocal loads
        loads += 1
        if loads == fail_at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return loader.read(key)

    backend = LocalExperts(loader, WeightsTier(loader, 1 << 30, read=read))
    assert torch.equal(generate(open_local(converted, backend=backend)[0], prompt), wanted)
    stats = backend.tier.stats
    assert stats.shrinks == 1
    assert stats.resident_bytes <= stats.budget_bytes < 1 << 30


def test_buffers_are_used_again_and_no_weight_changes_by_it(converted: Path, prompt: Tensor) -> None:
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    monkey = loader.buffers
    backend = LocalExperts(loader, WeightsTier(loader, 6 * loader.largest_room(torch.bfloat16)))
    key = ExpertKey(directory.manifest.model.moe_layers[0], 0)
    kept = loader.load(key, torch.bfloat16)
    before = [tensor.clone() for tensor in kept.tensors]
    generate(open_local(converted, backend=backend)[0], prompt)
    if loader.largest_room(torch.bfloat16) >= SMALLEST:
        assert monkey.reused > monkey.fresh
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors, before, strict=True))


def test_threads_may_share_a_model(converted: Path) -> None:
    model, _ = open_local(converted, dtype=torch.float32)
    prompts = [torch.randint(3, 250, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 12, 20, 9)]
    wanted = [generate(model, prompt) for prompt in prompts]
    fresh, _ = open_local(converted, dtype=torch.float32)  # loads while it computes
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: generate(fresh, prompt), prompts))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Failing:
    """A backend that raises once, at its `at`-th call."""

    def __init__(self, backend: ExpertsBackend, at: int) -> None:
        self.backend, self.calls, self.at = backend, 0, at

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ExpertUnavailable(layer, [3])
        return self.backend.run(layer, hidden, top_k_index, top_k_weights)


def backend_of(directory: ConvertedDirectory) -> LocalExperts:
    loader = ExpertLoader(directory.manifest, directory)
    return LocalExperts(loader, WeightsTier(loader, 1 << 30))


def test_an_error_leaves_generate_and_the_model_goes_on(converted: Path, prompt: Tensor) -> None:
    directory = ConvertedDirectory(converted)
    model, _ = open_local(converted)
    wanted = generate(model, prompt)
    attach_backend(model, Failing(backend_of(directory), at=8))
    with pytest.raises(ExpertUnavailable, match=r"layer 1: no live peer for expert\(s\) 3"):
        generate(model, prompt)
    assert torch.equal(generate(model, prompt), wanted)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "error"), [(_flip, CorruptShard), (_cut, CorruptShard), (Path.unlink, NotHeld)])
def test_a_damaged_expert_is_never_used(
    own_copy: Path, prompt: Tensor, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    directory = ConvertedDirectory(own_copy)
    shard = directory.manifest.experts[ExpertKey(directory.manifest.model.moe_layers[0], 2)]
    model, _ = open_local(own_copy)
    damage(own_copy / shard.file)
    with pytest.raises(error, match=shard.hash if error is NotHeld else shard.file):
        logits(model, prompt)


def test_tensors_that_make_no_expert_are_the_manifests_fault(own_copy: Path) -> None:
    directory = ConvertedDirectory(own_copy)
    manifest = directory.manifest
    transposed = replace(manifest, model=replace(manifest.model, ffn=replace(manifest.model.ffn, transposed=True)))
    with pytest.raises(ManifestError, match="experts are transposed"):
        ExpertLoader(transposed, directory).load(ExpertKey(manifest.model.moe_layers[0], 0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 0.5), (0.5, 1)], ids=str)
def test_an_expert_of_another_size_is_the_manifests_fault(
    converted: Path, dtype: torch.dtype, sizes: tuple[float, float]
) -> None:
    directory = ConvertedDirectory(converted)
    model = directory.manifest.model
    inner, hidden = int(model.intermediate_size * sizes[0]), int(model.hidden_size * sizes[1])
    other = replace(directory.manifest, model=replace(model, intermediate_size=inner, hidden_size=hidden))
    loader, key = ExpertLoader(other, directory), ExpertKey(model.moe_layers[0], 0)
    with pytest.raises(ManifestError, match=directory.manifest.experts[key].file):
        loader.load(key, dtype)


def test_a_token_may_choose_an_expert_twice(converted: Path) -> None:
    """As routers do that draw with replacement: each choice counts with its own weight."""
    directory = ConvertedDirectory(converted)
    model, backend = directory.manifest.model, backend_of(directory)
    hidden, weights = torch.randn(1, model.hidden_size), torch.tensor([[0.25, 0.5, 2.0]])
    for _ in range(2):  # absent, and resident
        found = backend.run(model.moe_layers[0], hidden, torch.tensor([[3, 1, 3]]), weights)
        once = backend.run(model.moe_layers[0], hidden, torch.tensor([[3, 1]]), torch.tensor([[2.25, 0.5]]))
        torch.testing.assert_close(found, once)
    both = backend.run(model.moe_layers[0], hidden.expand(2, -1), torch.tensor([[3, 1, 3]] * 2), weights.expand(2, -1))
    torch.testing.assert_close(both, found.expand(2, -1))


def test_unknown_mathematics_is_the_manifests_fault(converted: Path) -> None:
    with pytest.raises(ManifestError, match="expertFfn: unknown activation 'snake'"):
        spec_of(ExpertFfn(Gate.CONCATENATED, "snake"))
    manifest = Manifest.from_bytes((converted / MANIFEST_NAME).read_bytes())
    assert spec_of(manifest.model.ffn).activation == "silu"


def test_the_use_of_experts_is_counted(converted: Path, prompt: Tensor) -> None:
    model, _ = open_local(converted, dtype=torch.float32)
    before = routing_statistics(model)
    layers = {layer: torch.tensor(found.counts) for layer, found in before.items()}
    assert not any(counts.any() for counts in layers.values())
    for layer, counts in layers.items():

        def count(_module: Any, _inputs: Any, outputs: tuple[Tensor, ...], counts: Tensor = counts) -> None:
            counts += torch.bincount(outputs[2].flatten(), minlength=len(counts))

        model.model.layers[layer].mlp.gate.register_forward_hook(count)
    generate(model, prompt)
    found = routing_statistics(model)
    assert list(found) == sorted(layers)
    for layer, counts in layers.items():
        assert found[layer].counts == tuple(counts.tolist())
        assert sum(found[layer].counts) > prompt.numel()
        assert found[layer].load_balance > 1
