"""Every family: converted, compared tensor by tensor with what the safetensors library reads from the source."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import (
    EXTRA_FAMILIES,
    FAMILIES,
    INT4,
    QUANTIZED,
    Tensors,
    build_model,
    edit_config,
    load_tensors,
    save_bf16_twin,
    save_checkpoint,
    save_int4_twin,
)

from moehive.protocol.manifest import Gate, Manifest, ShardType
from moehive.swarm.convert import convert, inspect


def converted(source: Path) -> tuple[Manifest, Path]:
    destination = source.parent / "converted"
    return convert(source, destination), destination


def assert_experts_equal(manifest: Manifest, directory: Path, source: Tensors) -> None:
    """Each expert's file holds exactly the source's bytes, under the source's name or as a slice of a fused tensor."""
    for key, shard in manifest.experts.items():
        tensors = load_file(directory / shard.file)
        table = manifest.tensors_of[shard.hash]
        assert tensors
        assert set(tensors) == set(table)
        for name, tensor in tensors.items():
            prefix, expert, rest = name.rpartition(f".experts.{key.expert}.")
            expected = source[name] if name in source else source[f"{prefix}.experts.{rest}"][key.expert]
            assert expert
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), name
            assert table[name].shape == tuple(expected.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_experts_bytes_are_the_sources(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / name, max_shard_size="64KB")
    manifest, directory = converted(source)
    assert_experts_equal(manifest, directory, load_tensors(source))
    assert Manifest.from_bytes((directory / "manifest.json").read_bytes()) == manifest
    assert inspect(directory).faults == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_skeleton_is_everything_else(name: str, tmp_path: Path) -> None:
    """What the index names is the source without experts, quantised weights as the floating point that they mean."""
    source = save_checkpoint(name, tmp_path / name)
    save_twin = save_int4_twin if name in INT4 else save_bf16_twin
    expected = load_tensors(save_twin(source, tmp_path / "twin"))
    manifest, directory = converted(source)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    skeleton = {key: tensor for file in set(index.values()) for key, tensor in load_file(directory / file).items()}
    assert set(skeleton) == set(index) == {key for key in expected if ".experts." not in key}
    for key, tensor in skeleton.items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
    shared = {key for key in skeleton if ".shared_expert." in key or ".shared_experts." in key}
    in_shared_files = {manifest.shards[manifest.tensors[key].shard].type for key in shared}
    assert in_shared_files == ({ShardType.SHARED} if shared else set())


@pytest.mark.parametrize("name", EXTRA_FAMILIES)
def test_families_beyond_the_acceptance_convert_too(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / name, tokenizer=False)
    manifest, directory = converted(source)
    assert_experts_equal(manifest, directory, load_tensors(source))


@pytest.mark.parametrize("name", [*FAMILIES, *EXTRA_FAMILIES])
def test_the_manifest_says_what_transformers_modules_say(name: str, tmp_path: Path) -> None:
    """Layers, sizes, orientation and gate, read from the modules that transformers builds from the same config."""
    model = build_model(name)
    manifest, _ = converted(save_checkpoint(name, tmp_path / name, tokenizer=False))
    facts = manifest.model
    modules = {
        int(path.split(".layers.")[1].split(".")[0]): module
        for path, module in model.named_modules()
        if hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")
    }
    assert facts.moe_layers == tuple(modules)
    assert facts.mtp_layers == ()
    assert facts.architecture == type(model).__name__
    assert facts.model_type == model.config.model_type
    for module in modules.values():
        down = module.down_proj  # [E, H, I], transposed [E, I, H]
        hidden, intermediate = down.shape[:0:-1] if module.is_transposed else down.shape[1:]
        assert (facts.num_experts, facts.hidden_size, facts.intermediate_size) == (len(down), hidden, intermediate)
        assert facts.ffn.transposed == module.is_transposed
        assert facts.ffn.bias == module.has_bias
        assert (facts.ffn.gate is Gate.CONCATENATED) == module.is_concatenated
        assert module.has_gate
        if facts.ffn.gate is Gate.CLAMPED_INTERLEAVED:
            assert (facts.ffn.alpha, facts.ffn.limit) == (module.alpha, module.limit)


def test_top_k_is_the_configs(tmp_path: Path) -> None:
    manifest, _ = converted(save_checkpoint("qwen2_moe", tmp_path / "a", tokenizer=False, num_experts_per_tok=3))
    assert manifest.model.top_k == 3


def test_quantisation_is_in_the_manifest_and_ours_in_the_config(tmp_path: Path) -> None:
    methods = {}
    for name in QUANTIZED:
        manifest, directory = converted(save_checkpoint(name, tmp_path / name / "source", tokenizer=False))
        assert manifest.model.quantization
        methods[name] = (manifest.model.quantization.method, manifest.model.quantization.block)
        config = json.loads((directory / "config.json").read_text())
        assert config["quantization_config"] == {"quant_method": "moehive"}
    assert methods == {
        "gpt_oss_mxfp4": ("mxfp4", None),
        "deepseek_v3_fp8": ("fp8-block", (128, 128)),
        "mixtral_gptq": ("int4-gptq", (1, 32)),
        "qwen3_moe_awq": ("int4-awq", (1, 32)),
        "kimi_k2_int4": ("int4-pack-quantized", (1, 32)),
        "qwen3_moe_int4": ("int4-pack-quantized", (1, 32)),
    }


def test_gate_and_up_lie_together_at_a_page_boundary(tmp_path: Path) -> None:
    """So that one read gives both, and a reader can take them as one [2I, H] matrix without a copy."""
    manifest, directory = converted(save_checkpoint("deepseek_v3_fp8", tmp_path / "a", tokenizer=False))
    for key, shard in manifest.experts.items():
        names = list(manifest.tensors_of[shard.hash])
        order = [name.split(f".experts.{key.expert}.")[1] for name in names]
        weights = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
        assert order == [*weights, *(f"{weight}_scale_inv" for weight in weights)]
        assert manifest.tensors[names[0]].offset % 4096 == 0
        assert (
            int.from_bytes((directory / shard.file).read_bytes()[:8], "little") + 8 == manifest.tensors[names[0]].offset
        )


def test_kimi_becomes_native_and_its_code_stays_behind(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    source = save_checkpoint("kimi_k2", tmp_path / "kimi")
    manifest, directory = converted(source)
    assert not list(directory.rglob("*.py"))
    assert "auto_map" not in (directory / "config.json").read_text() + (directory / "tokenizer_config.json").read_text()
    assert AutoConfig.from_pretrained(directory).model_type == manifest.model.model_type == "deepseek_v3"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("Peer to peer")["input_ids"]) == "Peer to peer"
    assert tokenizer.chat_template


def test_multi_token_prediction_is_a_group_of_its_own(tmp_path: Path) -> None:
    source = save_checkpoint("glm4_moe", tmp_path / "glm", tokenizer=False, mtp=True)
    manifest, directory = converted(source)
    assert (manifest.model.moe_layers, manifest.model.mtp_layers) == ((1, 2), (3,))
    grouped = [shard for shard in manifest.shards if shard.group == "mtp"]
    assert {shard.expert_key.layer for shard in grouped if shard.expert_key} == {3}
    dense = [shard for shard in grouped if shard.type is ShardType.DENSE]
    kept = {name for shard in dense for name in manifest.tensors_of[shard.hash]}
    assert kept == {name for name in load_tensors(source) if ".layers.3." in name and ".experts." not in name}
    assert not {shard.file for shard in grouped} & {shard.file for shard in manifest.skeleton}
    assert not kept & set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
    assert not any(Path(shard.file).match("model*.safetensors") for shard in dense)


def test_qwen3_next_numbers_its_mtp_layers_from_zero(tmp_path: Path) -> None:
    """`mtp.layers.0` is not decoder layer 0: its experts would overwrite the decoder's."""
    from support.families import write_tensors

    source = save_checkpoint("qwen3_next", tmp_path / "next", tokenizer=False)
    tensors = load_tensors(source)
    last = {key: value.flip(0) for key, value in tensors.items() if "layers.3." in key}
    layer = {key.replace("model.layers.3.", "mtp.layers.0."): value for key, value in last.items()}
    write_tensors(source, {**tensors, **layer, "mtp.norm.weight": tensors["model.norm.weight"].clone()})
    manifest, directory = converted(source)
    assert (manifest.model.moe_layers, manifest.model.mtp_layers) == ((0, 1, 2, 3), (4,))
    assert_experts_equal(manifest, directory, load_tensors(source))


def test_fused_tensors_of_a_plain_family_are_sliced(tmp_path: Path) -> None:
    """transformers' own fused form [E, 2I, H], which it writes with save_original_format=False."""
    source = tmp_path / "fused"
    build_model("qwen3_moe").save_pretrained(source, save_original_format=False)
    manifest, directory = converted(source)
    assert_experts_equal(manifest, directory, load_tensors(source))
    assert "model.layers.0.mlp.experts.3.gate_up_proj" in manifest.tensors


def test_a_small_fp8_block_is_taken_from_the_config(tmp_path: Path) -> None:
    """The grid of scales alone does not tell the block: 144 rows under 2 scale rows are 128 + 16, not 72 + 72."""
    source = save_checkpoint("deepseek_v3_fp8", tmp_path / "a", tokenizer=False)
    ragged = load_tensors(source)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert ragged.shape[0] == 2
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(Exception, match="weight_scale_inv"):
        converted(source)
