"""Experts in 4 bits: the source's bytes, in one order, whatever of the packing a publisher chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import int4
from support.families import Tensors, edit_config, load_tensors, save_checkpoint, write_tensors
from support.raw_checkpoint import contents

from moehive.protocol.errors import CheckpointError, ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.swarm.convert import Converter, convert
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.store.directory import ConvertedDirectory


def repacked(source: Path, change: dict[str, torch.dtype]) -> Path:
    """The checkpoint with other dtypes, by the end of the tensors' names."""
    tensors = load_tensors(source)
    for name in tensors:
        for kind, dtype in change.items():
            if name.endswith(kind):
                tensors[name] = tensors[name].to(dtype)
    write_tensors(source, tensors)
    return source


def expert_tensors(tensors: Tensors, layer: int, expert: int) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if f".layers.{layer}.mlp.experts.{expert}." in name}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {int4.SCALE: torch.float16},
        {int4.SCALE: torch.float32, int4.SHAPE: torch.int32},
    ],
    ids=["kimi", "fp16 scales", "fp32 scales"],
)
def test_an_expert_has_the_sources_bytes_and_its_values(change: dict[str, torch.dtype], tmp_path: Path) -> None:
    source = repacked(save_checkpoint("kimi_k2_int4", tmp_path / "source", tokenizer=False), change)
    manifest = convert(source, tmp_path / "converted")
    wanted = expert_tensors(load_tensors(source), 2, 5)
    found = load_file(tmp_path / "converted" / manifest.experts[ExpertKey(2, 5)].file)
    assert len(found) == 9
    assert {name: (part.dtype, part.tolist()) for name, part in found.items()} == {
        name: (part.dtype, part.tolist()) for name, part in wanted.items()
    }
    values = int4.exact(wanted)
    loader = ExpertLoader(manifest, ConvertedDirectory(tmp_path / "converted"))
    weights = loader.load(ExpertKey(2, 5), torch.float32)
    stem = "model.layers.2.mlp.experts.5"
    gate, up, down = (values[f"{stem}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    assert torch.equal(weights.gate_up, torch.cat((gate, up)))
    assert torch.equal(weights.down, down)


def test_gate_and_up_lie_together_at_a_page_boundary(tmp_path: Path) -> None:
    """So that one read gives both, and what computes from 4 bits takes them as one matrix without a copy."""
    manifest = convert(save_checkpoint("kimi_k2_int4", tmp_path / "source", tokenizer=False), tmp_path / "converted")
    key, shard = min(manifest.experts.items())
    table = manifest.tensors_of[shard.hash]
    order = [name.split(f".experts.{key.expert}.")[1] for name in table]
    names = "gate_proj", "up_proj", "down_proj"
    assert order == [name + kind for kind in (int4.PACKED, int4.SCALE, int4.SHAPE) for name in names]
    assert next(iter(table.values())).offset % 4096 == 0
    loader = ExpertLoader(manifest, ConvertedDirectory(tmp_path / "converted"))
    stored = loader.read(key)
    matrix = loader.matrices(key, stored).gate_up
    assert matrix.data.data_ptr() == stored["gate_proj.weight_packed"].data_ptr()
    assert matrix.scale is not None
    assert matrix.scale.data_ptr() == stored["gate_proj.weight_scale"].data_ptr()


def test_zero_points_are_kept(tmp_path: Path) -> None:
    source = asymmetric(save_checkpoint("qwen3_moe", tmp_path / "source", tokenizer=False))
    manifest = convert(source, tmp_path / "converted")
    loader = ExpertLoader(manifest, ConvertedDirectory(tmp_path / "converted"))
    values = int4.exact(load_tensors(source))
    for key in manifest.experts:
        weights, stem = loader.load(key, torch.float32), f"model.layers.{key.layer}.mlp.experts.{key.expert}"
        gate, up, down = (values[f"{stem}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(weights.gate_up, torch.cat((gate, up)))
        assert torch.equal(weights.down, down)


def asymmetric(source: Path) -> Path:
    """A checkpoint in bf16 with all its projections packed, with zero points."""
    write_tensors(source, int4.pack_experts(load_tensors(source), zero_points=True, dense=True))
    group = int4.CONFIG["config_groups"]["group_0"]
    group = {**group, "weights": {**group["weights"], "symmetric": False}}
    edit_config(source, quantization_config={**int4.CONFIG, "config_groups": {"group_0": group}})
    return source


def skeleton_of(directory: Path) -> Tensors:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: part for file in set(index.values()) for name, part in load_file(directory / file).items()}


def test_weights_outside_the_experts_become_what_they_mean(tmp_path: Path) -> None:
    source = asymmetric(save_checkpoint("glm4_moe", tmp_path / "source", tokenizer=False))
    wanted = {name: part for name, part in int4.exact(load_tensors(source)).items() if ".experts." not in name}
    convert(source, tmp_path / "converted")
    found = skeleton_of(tmp_path / "converted")
    assert set(found) == set(wanted)
    assert any("shared_experts" in name for name in found)
    for name, part in wanted.items():
        assert found[name].dtype == torch.bfloat16 or "bias" in name
        assert torch.equal(found[name], part), name


@pytest.mark.parametrize("family", ["qwen3_moe_awq", "mixtral_gptq"])
def test_a_large_weight_is_widened_in_bands(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint(family, tmp_path / "source", tokenizer=False)
    convert(source, tmp_path / "whole")
    monkeypatch.setattr("moehive.swarm.convert.reading._PACKED_BAND", 64 * 3)  # rows at a time, the last one alone
    convert(source, tmp_path / "bands")
    assert contents(tmp_path / "bands") == contents(tmp_path / "whole")


def test_a_shape_that_is_not_the_values_is_refused(tmp_path: Path) -> None:
    source = asymmetric(save_checkpoint("qwen3_moe", tmp_path / "source", tokenizer=False))
    tensors = load_tensors(source)
    tensors["model.layers.0.self_attn.q_proj.weight_shape"] += 8
    write_tensors(source, tensors)
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.weight: "):
        convert(source, tmp_path / "converted")


def test_gptq_whose_inputs_are_out_of_order_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """Its config.json says otherwise, and no plan reads a weight."""
    source = save_checkpoint("mixtral_gptq", tmp_path / "source", tokenizer=False)
    tensors = load_tensors(source)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.g_idx"
    tensors[name] = tensors[name].flip(0)
    write_tensors(source, tensors)
    manifest = convert(source, tmp_path / "converted")
    loader = ExpertLoader(manifest, ConvertedDirectory(tmp_path / "converted"))
    loader.load(ExpertKey(1, 2), torch.float32)
    with pytest.raises(ManifestError, match=r"00003.safetensors: .*desc_act"):
        loader.load(ExpertKey(1, 3), torch.float32)


class Unplugged(Exception):
    """The test pulls the plug in the middle of a conversion."""


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = save_checkpoint("kimi_k2_int4", tmp_path / "source", tokenizer=False)
    expected = convert(source, tmp_path / "uninterrupted")

    def pull(done: int, total: int, file: str) -> None:
        if done > total // 2:
            raise Unplugged

    with pytest.raises(Unplugged):
        Converter(source, tmp_path / "converted", progress=pull).run()
    outcome = Converter(source, tmp_path / "converted").run()
    assert outcome.kept > 0
    assert outcome.manifest == expected
    assert contents(tmp_path / "converted") == contents(tmp_path / "uninterrupted")
