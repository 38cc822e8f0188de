"""A Qwen3-MoE checkpoint of random bytes, made without torch or transformers: for tests of bytes, files and memory."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moehive.protocol.safetensors_header import TensorSpec, build_header


def write_checkpoint(
    directory: Path,
    *,
    hidden: int = 32,
    intermediate: int = 16,
    experts: int = 4,
    layers: int = 2,
    files: int = 2,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write the checkpoint to `directory`, its tensors dealt to `files` in turn. `config` adds to config.json."""
    directory.mkdir(parents=True)
    facts = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": hidden, "dtype": "bfloat16",
        "moe_intermediate_size": intermediate, "num_experts": experts, "num_experts_per_tok": 2,
        "num_hidden_layers": layers, "hidden_act": "silu",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(facts | config))
    tensors = list(_tensors(hidden, intermediate, experts, layers))
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    noise = random.Random(seed)
    for number, name in enumerate(names):
        write_safetensors(directory / name, tensors[number::files], noise)
    weight_map = {tensor.name: names[index % files] for index, tensor in enumerate(tensors)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_safetensors(path: Path, tensors: Sequence[TensorSpec], noise: random.Random) -> None:
    """One file of random bytes."""
    with path.open("wb") as file:
        file.write(build_header(tensors))
        for tensor in tensors:
            file.write(noise.randbytes(tensor.size))


def _tensors(hidden: int, intermediate: int, experts: int, layers: int) -> Sequence[TensorSpec]:
    out = [
        TensorSpec("model.embed_tokens.weight", "BF16", (64, hidden)),
        TensorSpec("model.norm.weight", "BF16", (hidden,)),
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        out.append(TensorSpec(f"{prefix}.input_layernorm.weight", "BF16", (hidden,)))
        out.append(TensorSpec(f"{prefix}.mlp.gate.weight", "BF16", (experts, hidden)))
        for expert in range(experts):
            stem = f"{prefix}.mlp.experts.{expert}"
            out.append(TensorSpec(f"{stem}.down_proj.weight", "BF16", (hidden, intermediate)))
            out.append(TensorSpec(f"{stem}.gate_proj.weight", "BF16", (intermediate, hidden)))
            out.append(TensorSpec(f"{stem}.up_proj.weight", "BF16", (intermediate, hidden)))
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative name."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
