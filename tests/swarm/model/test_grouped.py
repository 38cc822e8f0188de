"""A layer's experts from slots with the kernels: the interpreter's numbers against the processor's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixed_loader import MixedLoader
from torch import Tensor

from moehive.kernels.routing import group_by_expert
from moehive.protocol.errors import ManifestError
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.device import DeviceExperts, slot_layout
from moehive.swarm.model.device_call import WeightedRows
from moehive.swarm.model.grouped import choices
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.slots import ExpertLayout, Parts, StoredLayout
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.accelerator import TorchAccelerator

TOKENS = 5


def loader_of(converted: Path, kind: type[ExpertLoader] = ExpertLoader) -> ExpertLoader:
    directory = ConvertedDirectory(converted)
    return kind(directory.manifest, directory)


def routed(loader: ExpertLoader, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], choices [T, K], weights [T, K]; the number of experts stands for none."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(loader.num_experts + 1, generator=generator)[: loader.top_k] for _ in range(TOKENS)]
    hidden = torch.randn(TOKENS, loader.manifest.model.hidden_size, generator=generator)
    return hidden, torch.stack(order), torch.rand(TOKENS, loader.top_k, generator=generator)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", ExpertLayout),
        ("gpt_oss", ExpertLayout),
        ("gpt_oss_mxfp4", StoredLayout),
        ("qwen3_moe_int4", StoredLayout),
        ("qwen3_moe_awq", StoredLayout),
    ],
)
@pytest.mark.parametrize("slots", ["floor", "all"])
def test_a_layer_is_what_the_processor_makes_of_it(checkpoints: Any, family: str, layout: type, slots: str) -> None:
    loader = loader_of(checkpoints.converted(family))
    manifest = loader.manifest
    chosen = slot_layout(loader, torch.float32, kernels=True)
    assert type(chosen) is layout
    count = 2 * loader.top_k + 1 if slots == "floor" else len(manifest.experts)
    ram = WeightsTier(loader, 1 << 30)
    ram.hold_stored(torch.float32, len(manifest.experts), uploads=layout is StoredLayout)
    plain = LocalExperts(loader, WeightsTier(loader, 1 << 30))
    experts = DeviceExperts(
        loader,
        ram,
        TorchAccelerator(torch.device("cpu")),
        torch.float32,
        count * chosen.nbytes,
        kernels=True,
    )
    assert experts.grouped is not None
    for layer in manifest.model.moe_layers[:3]:
        for seed in (1, 0):
            call = routed(loader, seed)
            with torch.inference_mode(bool(seed)):  # tables must do for both
                torch.testing.assert_close(experts.run(layer, *call), plain.run(layer, *call), rtol=1e-4, atol=1e-5)
    stats = experts.device_stats
    assert stats.loads > 0
    assert stats.hits > 0
    assert (experts.stored_stats is not None) == (layout is StoredLayout)
    experts.close()


def test_weights_that_the_kernels_do_not_read_lie_as_torch_computes_with_them(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("gpt_oss_mxfp4"))
    assert type(slot_layout(loader, torch.bfloat16, kernels=False)) is ExpertLayout


@pytest.mark.interpreted
def test_experts_that_are_stored_in_two_forms_are_summed_in_one_call(checkpoints: Any) -> None:
    loader = loader_of(checkpoints.converted("deepseek_v3_fp8"), MixedLoader)
    ram, plain = WeightsTier(loader, 1 << 30), LocalExperts(loader, WeightsTier(loader, 1 << 30))
    slot = slot_layout(loader, torch.bfloat16, kernels=True)
    assert (type(slot), len(slot.forms)) == (StoredLayout, 2)
    slots, accelerator = (2 * loader.top_k + 1) * slot.nbytes, TorchAccelerator(torch.device("cpu"))
    experts = DeviceExperts(loader, ram, accelerator, torch.bfloat16, slots, kernels=True)
    for layer in loader.manifest.model.moe_layers[:3]:
        hidden, index, weights = routed(loader, layer)
        hidden = hidden.bfloat16()
        exact = plain.run(layer, hidden.float(), index, weights)
        found = experts.run(layer, hidden, index, weights).float()
        assert (found - exact).norm() < 0.01 * exact.norm()  # eager's bf16 sums are off by 0.006
    assert experts.device_stats.evictions > 0, "no slot was used for both forms"
    experts.close()


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt_oss_mxfp4", ExpertLoader), ("deepseek_v3_fp8", ExpertLoader), ("deepseek_v3_fp8", MixedLoader)],
)
def test_a_slot_as_stored_holds_fewer_bytes_and_the_same_values(
    checkpoints: Any, family: str, kind: type[ExpertLoader]
) -> None:
    loader = loader_of(checkpoints.converted(family), kind)
    layout = StoredLayout.of(loader, torch.bfloat16)
    assert layout is not None
    plain = ExpertLayout.of(loader.manifest.model, torch.bfloat16).nbytes
    assert layout.nbytes == plain if kind is MixedLoader else layout.nbytes < plain
    ram = WeightsTier(loader, 1 << 30)
    for key in loader.manifest.experts:
        memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        layout.pack(key, ram, memory)
        wanted, found = loader.load(key, torch.bfloat16), layout.weights(layout.form_of(key), memory)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors, wanted.tensors, strict=True))
    ram.close()


@pytest.mark.parametrize("other", [torch.ones(4, 2), torch.ones(2, 4, dtype=torch.float64)], ids=["shape", "dtype"])
def test_an_expert_unlike_others_is_refused_rather_than_rounded(other: Tensor) -> None:
    parts = Parts.of([torch.ones(2, 4)])
    with pytest.raises(ManifestError, match="others of the model"):
        parts.write([other], torch.empty(parts.nbytes, dtype=torch.uint8))


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_choices_are_those_that_the_groups_came_from(seed: int, tokens: int, top_k: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(6, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    groups = [WeightedRows(g.expert, g.token, weights[g.token, g.position]) for g in group_by_expert(index, 5)]
    if not groups:
        return
    found, found_weights = choices(groups, tokens, width, absent=5)
    assert found.shape == found_weights.shape
    assert found.shape[1] in (width, 2 * width, 4 * width)
    for token in range(tokens):
        wanted = {int(e): float(w) for e, w in zip(index[token], weights[token], strict=True) if e < 5}
        here = {int(e): float(w) for e, w in zip(found[token], found_weights[token], strict=True) if e < 5}
        assert here == wanted
