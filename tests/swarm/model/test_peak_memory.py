"""Loading a model allocates its dense part and nothing else: measured on 10 GB of experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build_config
from transformers import AutoModelForCausalLM

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_count, chunk_hash, chunk_range
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import (
    MANIFEST_NAME,
    ExpertFfn,
    Gate,
    Manifest,
    ModelFacts,
    ShardEntry,
    ShardType,
    TensorEntry,
)  # fmt: skip

LAYERS, EXPERTS, HIDDEN, INNER = 4, 64, 1024, 6656
EXPERT_BYTES = 3 * HIDDEN * INNER * 2

# VmHWM and not getrusage: the latter's maximum is handed down from the process that forked us.
_LOAD = """
import re, sys
from pathlib import Path
import moehive.swarm
from transformers import AutoModelForCausalLM
import transformers.models.qwen3_moe.modeling_qwen3_moe
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
dense = sum(parameter.nbytes for parameter in model.parameters())
touched = sum(float(parameter.sum()) for parameter in model.parameters())  # pages of a mapped file count once read
print(before, dense, peak())
"""


def zeros(size: int) -> ChunkList:
    """The chunk list of a sparse file, hashed without reading it."""
    whole = chunk_hash(bytes(CHUNK_SIZE))
    hashes = [whole] * chunk_count(size)
    if size % CHUNK_SIZE:
        hashes[-1] = chunk_hash(bytes(chunk_range(len(hashes) - 1, size)[1]))
    return ChunkList(size, tuple(hashes))


def dense_file(config: Any, path: Path) -> dict[str, TensorEntry]:
    """A safetensors file with every dense weight, all zero and sparse after its header."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".experts." not in name}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    base = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(base + end)
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}
    return {
        name: TensorEntry(0, base + offsets[name], 2 * torch.Size(shape).numel(), shape, "BF16")
        for name, shape in shapes.items()
    }


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """A converted Qwen3-MoE directory with 10 GB of experts on paper and hardly a byte on disk."""
    config = build_config(
        "qwen3_moe", hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_experts=EXPERTS, moe_intermediate_size=INNER,
        vocab_size=8192, num_attention_heads=16, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    document = config.to_dict() | {
        "dtype": "bfloat16", "quantization_config": {"quant_method": "moehive"}, "experts_implementation": "moehive",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(document))
    tensors = dense_file(config, tmp_path / "model.safetensors")
    shards = []
    for name, type_ in (("model.safetensors", ShardType.DENSE), ("config.json", ShardType.ASSET)):
        chunks = ChunkList.of((tmp_path / name).read_bytes())
        shards.append(ShardEntry(name, type_, chunks.size, chunks.root))
    root = zeros(EXPERT_BYTES).root
    for key in (ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)):
        shards.append(ShardEntry(f"expert_{key}.safetensors", ShardType.EXPERT, EXPERT_BYTES, root, key))
        with (tmp_path / shards[-1].file).open("wb") as file:
            file.truncate(EXPERT_BYTES)
    facts = ModelFacts(
        name="huge", model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", dtype="BF16", hidden_size=HIDDEN,
        intermediate_size=INNER, num_experts=EXPERTS, top_k=4, moe_layers=tuple(range(LAYERS)),
        ffn=ExpertFfn(Gate.CONCATENATED, "silu"),
    )  # fmt: skip
    (tmp_path / MANIFEST_NAME).write_bytes(Manifest(facts, tuple(shards), tensors).to_bytes())
    return tmp_path


def test_loading_takes_the_dense_part_and_ten_percent(huge: Path) -> None:
    assert LAYERS * EXPERTS * EXPERT_BYTES > 10e9
    command = [sys.executable, "-c", _LOAD, str(huge)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    before, dense, peak = map(int, output.split())
    assert 50e6 < dense < 150e6
    assert peak <= 1.1 * (before + dense), f"{before} bytes imported, {dense} dense, {peak} at the peak"
