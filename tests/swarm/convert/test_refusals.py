"""What cannot be converted is refused before anything is written, and says what is wrong."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import int4
from support.raw_checkpoint import contents, write_checkpoint, write_safetensors

from moehive.protocol.errors import CheckpointError, DestinationError, MoehiveError, UnsupportedModel
from moehive.protocol.safetensors_header import TensorSpec
from moehive.swarm.convert import Converter, convert

Change = Callable[[Path], object]
FIRST = "model-00001-of-00002.safetensors"


def configured(**values: Any) -> Change:
    def change(source: Path) -> None:
        path = source / "config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def indexed(change: Callable[[dict[str, str]], object]) -> Change:
    def edit(source: Path) -> None:
        path = source / "model.safetensors.index.json"
        document = json.loads(path.read_text())
        change(document["weight_map"])
        path.write_text(json.dumps(document))

    return edit


def single(*tensors: TensorSpec, **config: Any) -> Change:
    """Instead of the checkpoint: one file with these tensors."""

    def change(source: Path) -> None:
        for file in source.glob("model*"):
            file.unlink()
        write_safetensors(source / "model.safetensors", tensors, random.Random(0))
        configured(**config)(source)

    return change


def packed_config(*, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    """The entry of config.json for 4 bits in groups of 32; `weights` replace settings of the weights."""
    group = int4.CONFIG["config_groups"]["group_0"]
    group = {**group, "input_activations": inputs, "weights": {**group["weights"], **weights}}
    return {"quantization_config": {**int4.CONFIG, "config_groups": {"group_0": group}}}


def compressed(**settings: Any) -> Change:
    return configured(**packed_config(**settings))


def as_packed(weight: TensorSpec) -> list[TensorSpec]:
    """A weight in 4 bits."""
    (rows, columns), stem = weight.shape, weight.name
    return [
        TensorSpec(f"{stem}_packed", "I32", (rows, columns // 8)),
        TensorSpec(f"{stem}_scale", "BF16", (rows, -(-columns // 32))),
        TensorSpec(f"{stem}_shape", "I64", (2,)),
    ]


def experts(
    *, missing: str = "", layers: int = 1, dtype: str = "BF16", packed: bool = False, **shapes: tuple[int, ...]
) -> list[TensorSpec]:
    """A layer's tensors: hidden 32, intermediate 16, two experts."""
    out = [TensorSpec("model.layers.0.input_layernorm.weight", "BF16", (32,))]
    for layer in range(layers):
        for expert in range(2):
            for name, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16))):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                weight = TensorSpec(key, dtype, shapes.get(name, shape))
                if key != missing:
                    out += as_packed(weight) if packed else [weight]
    return out


GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 2, "intermediate_size": 16}
SMALL = {"num_experts": 2, "num_hidden_layers": 1}
EXTRA_PART = TensorSpec("model.layers.0.mlp.experts.0.gate_proj.weight_g_idx", "I32", (32,))
PACKED = TensorSpec("model.layers.0.mlp.experts.0.gate_proj.weight_packed", "I32", (16, 4))
ORPHANED = TensorSpec("model.layers.0.self_attn.q_proj.weight_scale", "BF16", (32, 1))
WIDE = TensorSpec("model.layers.0.self_attn.q_proj.weight", "BF16", (32, 32))
NARROW = TensorSpec("model.layers.0.self_attn.q_proj.weight", "BF16", (16, 32))
EMPTY = TensorSpec("model.layers.0.self_attn.q_proj.weight_packed", "I32", (32, 0))
DENSE_QWEIGHT = TensorSpec("model.layers.0.self_attn.q_proj.qweight", "I32", (4, 32))
DENSE_PACKED = TensorSpec("model.layers.0.self_attn.q_proj.weight_packed", "I32", (32, 4))
NO_RULE = TensorSpec("model.layers.0.mlp.experts.0.gate_proj.weight.absmax", "F32", (4,))
DENSE = TensorSpec("model.layers.0.mlp.gate_proj.weight", "BF16", (4, 4))
ROUTER = TensorSpec("model.layers.1.mlp.gate.weight", "BF16", (2, 32))
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ORPHAN = TensorSpec("model.layers.0.self_attn.q_proj.weight_scale_inv", "F32", (1, 1))
UNSCALED = TensorSpec("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", (32, 32))

UNSUPPORTED: list[tuple[Change, str]] = [
    (configured(model_type="llama4_text"), "llama4_text.*pre-multiplied"),
    (configured(model_type="dbrx"), "dbrx.*no hook"),
    (configured(model_type="newcomer"), "newcomer.*moehive knows: .*mixtral"),
    (configured(architectures=["Qwen3MoeForSequenceClassification"]), "SequenceClassification"),
    (configured(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    (configured(quantization_config={**int4.GPTQ_CONFIG, "desc_act": True}), "desc_act.*convert the checkpoint"),
    (configured(quantization_config={**int4.GPTQ_CONFIG, "bits": 8}), "GPTQ of 8 bits"),
    (configured(quantization_config={**int4.GPTQ_CONFIG, "group_size": -1}), "GPTQ with one scale for a whole row"),
    (configured(quantization_config={**int4.GPTQ_CONFIG, "checkpoint_format": "marlin"}), "format 'marlin'"),
    (configured(quantization_config={**int4.AWQ_CONFIG, "version": "GEMV"}), "version 'gemv'"),
    (configured(quantization_config={**int4.AWQ_CONFIG, "zero_point": False}), "AWQ without zero points"),
    (configured(quantization_config={"quant_method": "fp8"}), "weight_block_size"),
    (configured(quantization_config={**FP8, "activation_scheme": "static"}), "static"),
    (configured(quantization_config={**int4.CONFIG, "format": "int-quantized"}), "format 'int-quantized'"),
    (configured(quantization_config={**int4.CONFIG, "kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme"),
    (configured(quantization_config={**int4.CONFIG, "transform_config": {"a": {}}}), "transform_config"),
    (configured(quantization_config={**int4.CONFIG, "sparsity_config": {"format": "sparse-24-bitmask"}}), "sparsity"),
    (configured(quantization_config={**int4.CONFIG, "config_groups": {"a": {}, "b": {}}}), "2 config_groups"),
    (compressed(num_bits=8), r"of 8 bits of type 'int'.*4 bits in groups.*convert the checkpoint that it was made of"),
    (compressed(type="float"), "of 4 bits of type 'float'"),
    (compressed(strategy="channel", group_size=None), "strategy 'channel' and group_size None"),
    (compressed(strategy=None, group_size=-1), "group_size -1"),
    (compressed(dynamic=True), "dynamic"),
    (compressed(actorder="group"), "actorder 'group'"),
    (compressed(inputs={"num_bits": 8}), "quantised input_activations"),
    (
        single(*experts(packed=True), **SMALL, moe_intermediate_size=12, quantization_config=int4.AWQ_CONFIG),
        r"\[12, 32\] in 4 bits of int4-awq .* multiples of 8",
    ),
    (single(*experts(packed=True), **GPT_OSS, **SMALL, **packed_config()), "transposed"),
    (configured(quantization_config={"quant_method": "moehive"}), "a moehive conversion already"),
    (single(DENSE, model_type="llama", num_hidden_layers=1), "llama.*no expert tensors.*dense"),
    (single(*experts(), EXTRA_PART, **SMALL), "kind 'weight_g_idx'"),
    (single(*experts(), NO_RULE, **SMALL), "absmax.*no rule"),
]

INCONSISTENT: list[tuple[Change, str]] = [
    (lambda source: (source / "config.json").unlink(), "no config.json"),
    (lambda source: (source / "config.json").write_text("{"), "not JSON"),
    (lambda source: (source / "config.json").write_text("[]"), "not a JSON object"),
    (configured(model_type=None), "no model_type"),
    (configured(hidden_size=None), "no hidden_size"),
    (configured(num_experts="four"), "positive integer"),
    (configured(num_experts=5), "layer 0: expert 4 is missing"),
    (configured(num_experts=3), "layer 0: expert 3 is too many"),
    (configured(moe_intermediate_size=17), "shape.*expected"),
    (configured(num_hidden_layers=3), "layer 2"),
    (configured(hidden_act=7), "hidden_act"),
    (configured(quantization_config=FP8), "weight_scale_inv of gate is missing"),
    (configured(quantization_config={"quant_method": "mxfp4"}), "blocks of gate is missing"),
    (lambda source: (source / FIRST).unlink(), "missing"),
    (lambda source: (source / FIRST).write_bytes((source / FIRST).read_bytes()[:-1]), "truncated"),
    (lambda source: (source / FIRST).write_bytes((source / FIRST).read_bytes()[:100]), "truncated"),
    (lambda source: (source / FIRST).write_bytes(b""), "too short"),
    (lambda source: (source / FIRST).write_bytes(b"PK" * 50), "not a safetensors file"),
    (lambda source: (source / "model.safetensors").write_bytes(b""), "both"),
    (lambda source: (source / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
    (lambda source: (source / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    (indexed(lambda names: names.update(ghost=FIRST)), "names ghost"),
    (indexed(lambda names: names.update(ghost="../outside.safetensors")), "outside"),
    (single(*experts(missing="model.layers.0.mlp.experts.1.up_proj.weight"), **SMALL), "weight of up is missing"),
    (single(*experts(up_proj=(16, 31)), **SMALL), "up_proj.*shape"),
    (single(*experts(dtype="I8"), **SMALL), "dtype I8"),
    (single(*experts(dtype="F8_E4M3"), **SMALL), "dtype F8_E4M3"),
    (single(*experts(), PACKED, **SMALL), r"weight_packed does not fit .*quantization: none"),
    (compressed(), r"gate_proj.weight does not fit .*quantization: int4-pack-quantized"),
    (single(*experts(packed=True), **SMALL, **packed_config(group_size=16)), r"weight_scale: shape \[16, 1\].*16, 2"),
    (single(*experts(packed=True), **SMALL, **packed_config(symmetric=False)), "weight_zero_point of gate is missing"),
    (single(*experts(), DENSE_PACKED, **SMALL), "q_proj.weight_packed holds packed values, but config.json"),
    (single(*experts(packed=True), DENSE_PACKED, **SMALL, **packed_config()), "q_proj.weight_scale is missing"),
    (single(*experts(packed=True), *as_packed(WIDE), WIDE, **SMALL, **packed_config()), "q_proj.weight: .* in 4 bits"),
    (single(*experts(packed=True), ORPHANED, **SMALL, **packed_config()), "weight_scale belongs to a packed weight"),
    (
        single(*experts(packed=True), *as_packed(NARROW)[1:], DENSE_PACKED, **SMALL, **packed_config()),
        r"weight_scale: dtype BF16 and shape \[16, 1\], expected .* \[32, 1\]",
    ),
    (single(*experts(packed=True), EMPTY, **SMALL, **packed_config()), r"weight_packed is expected, not \[32, 0\]"),
    (single(*experts(packed=True), DENSE_QWEIGHT, **SMALL, **packed_config()), "a matrix weight_packed is expected"),
    (configured(quantization_config=int4.AWQ_CONFIG), "qweight of gate is missing"),
    (configured(quantization_config={**int4.AWQ_CONFIG, "group_size": 0}), "group_size is 0, a positive integer"),
    (compressed(group_size="32"), "group_size is '32', a positive integer"),
    (configured(quantization_config={**int4.CONFIG, "config_groups": None}), "no config_groups"),
    (configured(quantization_config={**int4.CONFIG, "config_groups": {"group_0": {}}}), "how its weights"),
    (single(*experts(), ROUTER, num_experts=2, num_hidden_layers=2), "is a router, but its layer has no experts"),
    (single(*experts(), UNSCALED, **SMALL), "is fp8, but it has no scales"),
]


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED)
def test_an_unsupported_model_is_named_with_the_reason(change: Change, reason: str, tmp_path: Path) -> None:
    assert_refused(change, UnsupportedModel, reason, tmp_path)


@pytest.mark.parametrize(("change", "reason"), INCONSISTENT)
def test_an_inconsistent_checkpoint_is_refused(change: Change, reason: str, tmp_path: Path) -> None:
    assert_refused(change, CheckpointError, reason, tmp_path)


def assert_refused(change: Change, kind: type[MoehiveError], reason: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    change(source)
    with pytest.raises(kind, match=reason):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_the_unchanged_checkpoint_is_not_refused(tmp_path: Path) -> None:
    """Otherwise the tests above could pass for the wrong reason."""
    assert convert(write_checkpoint(tmp_path / "source"), tmp_path / "converted").model.name == "source"


def test_an_orphaned_scale_is_refused(tmp_path: Path) -> None:
    from support.families import load_tensors, save_checkpoint, write_tensors

    source = save_checkpoint("deepseek_v3_fp8", tmp_path / "source", tokenizer=False)
    tensors = load_tensors(source)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    write_tensors(source, tensors)
    with pytest.raises(CheckpointError, match="weight_scale_inv scales a weight"):
        convert(source, tmp_path / "converted")


def test_tensors_the_index_points_away_from_are_not_taken_twice(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", files=1)
    write_safetensors(source / "extra.safetensors", [TensorSpec("model.norm.weight", "BF16", (7,))], random.Random(1))
    indexed(lambda names: names.update({"model.norm.weight": "extra.safetensors"}))(source)
    manifest = convert(source, tmp_path / "converted")
    assert manifest.tensors["model.norm.weight"].shape == (7,)


def test_files_that_no_index_names_are_not_read(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    before = convert(source, tmp_path / "before")
    (source / "consolidated.safetensors").write_bytes(b"junk")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"junk")
    assert convert(source, tmp_path / "after") == before


# --- destinations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "inside", "..", "inside/deep"])
def test_a_destination_within_the_source_or_around_it_is_refused(place: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    before = contents(tmp_path)
    with pytest.raises(DestinationError, match="within each other"):
        convert(source, source / place)
    assert contents(tmp_path) == before


def test_a_destination_with_other_files_is_left_alone(tmp_path: Path) -> None:
    """Even where all their names are ours, as those of a copy of the checkpoint are."""
    source = write_checkpoint(tmp_path / "source", files=1)
    for names in (["notes.txt"], ["config.json", "model-00001-of-00001.safetensors"]):
        destination = tmp_path / names[0]
        destination.mkdir()
        for name in names:
            (destination / name).write_text("precious")
        with pytest.raises(DestinationError, match="holds other files"):
            convert(source, destination)
        assert contents(destination) == dict.fromkeys(names, b"precious")


def test_a_destination_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DestinationError, match="is a file"):
        convert(write_checkpoint(tmp_path / "source"), tmp_path / "file")


@pytest.mark.parametrize("shape", [{"layers": 3}, {"hidden": 64}, {"seed": 1}])
def test_another_models_conversion_is_never_overwritten(shape: dict[str, int], tmp_path: Path) -> None:
    """Also one of equal shapes, which only its bytes tell apart."""
    destination = tmp_path / "converted"
    convert(write_checkpoint(tmp_path / "one"), destination, name="m")
    before = contents(destination)
    with pytest.raises(DestinationError, match=r"another model|another checkpoint|does not belong"):
        convert(write_checkpoint(tmp_path / "other", **shape), destination, name="m")
    assert contents(destination) == before


def test_a_damaged_manifest_is_not_overwritten(tmp_path: Path) -> None:
    source, destination = write_checkpoint(tmp_path / "source"), tmp_path / "converted"
    convert(source, destination)
    (destination / "manifest.json").write_bytes(b"{")
    with pytest.raises(DestinationError, match="cannot be read"):
        convert(source, destination)


def test_a_source_that_changes_meanwhile_gives_no_manifest(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    touched: list[str] = []

    def touch(done: int, total: int, file: str) -> None:
        if not touched and file.startswith("experts"):
            touched.append(file)
            with (source / FIRST).open("r+b") as stream:
                stream.seek(-1, 2)
                stream.write(b"!")

    with pytest.raises(CheckpointError, match="changed during the conversion"):
        Converter(source, tmp_path / "converted", progress=touch).run()
    assert touched
    assert not (tmp_path / "converted" / "manifest.json").exists()
