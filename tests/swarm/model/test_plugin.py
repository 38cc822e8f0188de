"""The plug-in's promises around loading: what it refuses, what it verifies, and what happens without it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moehive.protocol.errors import CorruptShard, ManifestError, MoehiveError, StorageError, UnsupportedModel
from moehive.protocol.manifest import MANIFEST_NAME, REPORT_NAME, Gate, Manifest, ShardType
from moehive.swarm import open_local
from moehive.swarm.model.seats import attach_backend, check_active
from moehive.swarm.store.directory import ConvertedDirectory


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


def rewrite(directory: Path, **facts: Any) -> None:
    """A valid manifest with other model facts."""
    path = directory / MANIFEST_NAME
    manifest = Manifest.from_bytes(path.read_bytes())
    path.write_bytes(replace(manifest, model=replace(manifest.model, **facts)).to_bytes())
    (directory / REPORT_NAME).unlink()  # it would tell that this is not what was converted


# --- loading --------------------------------------------------------------------------------------------------------


def test_no_expert_parameter_exists_after_loading(converted: Path) -> None:
    model, tokenizer = open_local(converted)
    assert [name for name, _ in model.named_parameters() if ".experts." in name] == []
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("To be")["input_ids"]) == "To be"


def test_another_implementation_cannot_be_chosen_for_a_model_without_weights(converted: Path, prompt: Any) -> None:
    asked = AutoModelForCausalLM.from_pretrained(converted, experts_implementation="eager")
    check_active(asked)
    assert torch.equal(asked(input_ids=prompt).logits, load(converted)(input_ids=prompt).logits)


def test_a_plain_model_is_recognised(checkpoints: Any, converted: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints.source("qwen3_moe"))
    with pytest.raises(UnsupportedModel, match="moehive is not active"):
        check_active(plain)
    with pytest.raises(UnsupportedModel, match="it keeps its experts itself"):
        attach_backend(plain, object())  # type: ignore[arg-type]


def test_saving_the_model_is_refused_with_the_reason(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("moehive.swarm.model.plugin.logger.warning", warnings.append)
    with pytest.raises(ValueError, match="quantized with moehive and is not serializable"):
        load(converted).save_pretrained(tmp_path / "saved")
    assert "copying its converted directory" in warnings[0]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [ShardType.DENSE, ShardType.SHARED])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte_in_the_skeleton_is_refused(
    checkpoints: Any, tmp_path: Path, type_: ShardType, place: str
) -> None:
    directory = copytree(checkpoints.converted("qwen2_moe"), tmp_path / "copy")
    shard = Manifest.from_bytes((directory / MANIFEST_NAME).read_bytes()).of_type(type_)[0]
    flip(directory / shard.file, {"first": 9, "middle": shard.size // 2, "last": -1}[place])
    with pytest.raises(CorruptShard, match=shard.file):
        load(directory)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_changed_asset_is_refused(own_copy: Path, file: str) -> None:
    path = own_copy / file
    path.write_bytes(path.read_bytes() + b"\n")  # still valid JSON with the same meaning
    with pytest.raises(CorruptShard, match=file):
        load(own_copy)
    path.write_bytes(b"{")  # what transformers itself would stumble over
    with pytest.raises(CorruptShard, match=file):
        open_local(own_copy)
    path.unlink()
    with pytest.raises(StorageError, match=f"cannot read .*{file}"):
        open_local(own_copy)


def test_a_flipped_byte_anywhere_in_the_manifest_is_refused(own_copy: Path) -> None:
    data = (own_copy / MANIFEST_NAME).read_bytes()
    for position in range(0, len(data), 101):
        changed = bytearray(data)
        changed[position] ^= 1
        (own_copy / MANIFEST_NAME).write_bytes(changed)
        with pytest.raises(ManifestError):
            ConvertedDirectory(own_copy)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "manifest.json"), (b"", "not JSON"), (b"{}", "'format' is missing")]
)
def test_a_directory_without_a_valid_manifest_is_refused(own_copy: Path, content: bytes | None, message: str) -> None:
    path = own_copy / MANIFEST_NAME
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for opener in (load, open_local):
        with pytest.raises(ManifestError, match=message):
            opener(own_copy)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_experts": 4, "top_k": 4}, "expert 1_4 is missing or is not one of"),
        ({"ffn": {"transposed": True}}, "transposed: False in transformers, True in the manifest"),
        ({"ffn": {"bias": True}}, "biased: False in transformers, True in the manifest"),
        ({"ffn": {"gate": Gate.CLAMPED_INTERLEAVED, "alpha": 1.7, "limit": 7.0}}, "gate of their own: False in tr"),
        ({"ffn": {"activation": "snake"}}, "unknown activation 'snake'"),
        ({"ffn": {"activation": "relu"}}, "activation: SiLUActivation in transformers, ReLU in the manifest"),
    ],
)
def test_a_manifest_of_other_experts_is_refused(
    checkpoints: Any, tmp_path: Path, facts: dict[str, Any], message: str
) -> None:
    directory = copytree(checkpoints.converted("deepseek_v3"), tmp_path / "copy")
    if "ffn" in facts:
        manifest = Manifest.from_bytes((directory / MANIFEST_NAME).read_bytes())
        facts = {"ffn": replace(manifest.model.ffn, **facts["ffn"])}
    rewrite(directory, **facts)
    with pytest.raises(MoehiveError, match=message):
        load(directory)


def test_experts_in_other_layers_are_refused(own_copy: Path, checkpoints: Any) -> None:
    manifest = Manifest.from_bytes((own_copy / MANIFEST_NAME).read_bytes())
    last = manifest.model.moe_layers[-1]
    rewrite(own_copy, moe_layers=manifest.model.moe_layers[:-1], mtp_layers=(last,))
    with pytest.raises(UnsupportedModel, match=r"routed experts in layers \[0, 1, 2\], the manifest in \[0, 1\]"):
        load(own_copy)


def test_clamped_experts_with_another_limit_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    directory = copytree(checkpoints.converted("gpt_oss"), tmp_path / "copy")
    manifest = Manifest.from_bytes((directory / MANIFEST_NAME).read_bytes())
    rewrite(directory, ffn=replace(manifest.model.ffn, limit=6.5))
    with pytest.raises(UnsupportedModel, match=r"alpha and limit: \(1.702, 7.0\) in transformers, \(1.702, 6.5\)"):
        load(directory)


def test_a_weights_file_that_the_manifest_does_not_name_is_not_read(own_copy: Path) -> None:
    (own_copy / "extra.safetensors").write_bytes(next(own_copy.rglob("*.safetensors")).read_bytes())
    index = own_copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = "extra.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=r"extra.safetensors is not a dense or shared shard"):
        load(own_copy)


# --- with and without the import ------------------------------------------------------------------------------------

_LIGHT = """
import sys
import moehive.swarm
print(sorted({"torch", "transformers", "numpy", "hivemind"} & set(sys.modules)))
"""

_LATE = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import moehive.swarm
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).hf_quantizer).__name__)
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout


def test_importing_swarm_imports_neither_torch_nor_transformers() -> None:
    assert run(_LIGHT) == "[]\n"


def test_without_the_import_transformers_refuses_and_a_late_import_is_in_time(converted: Path) -> None:
    """transformers only warns about an unknown quantizer; the unknown experts implementation is what stops it."""
    refusal, quantizer = run(_LATE, str(converted)).splitlines()
    assert refusal.startswith('Specified `experts_implementation="moehive"` is not supported')
    assert quantizer == "MoehiveQuantizer"
