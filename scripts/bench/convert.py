"""Conversion against plainly copying the same files to the same disk: `python scripts/bench/convert.py [DIRECTORY]`.

A synthetic checkpoint of Qwen3-30B-A3B's shapes (9.4 MB per expert) with fewer layers and experts. Both sides start
with the source in the page cache and end with everything on disk: `cp -r` is followed by `sync -f`; the conversion
syncs each file itself, hashes every byte, and moves every expert's tensors together.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moehive.protocol.safetensors_header import TensorSpec, build_header
from moehive.swarm.convert import convert, inspect

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCABULARY = 2048, 768, 32, 6, 32768
ROUNDS = 3


def write_checkpoint(directory: Path) -> int:
    """Random bytes under a Qwen3-MoE's names, one file per layer; the number of bytes."""
    directory.mkdir()
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS, "num_experts_per_tok": 8,
        "num_hidden_layers": LAYERS, "dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors = [TensorSpec(f"{prefix}.self_attn.o_proj.weight", "BF16", (4096, HIDDEN))]
        if layer == 0:
            tensors.append(TensorSpec("model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)))
        for expert in range(EXPERTS):
            stem = f"{prefix}.mlp.experts.{expert}"
            tensors += [
                TensorSpec(f"{stem}.down_proj.weight", "BF16", (HIDDEN, INTERMEDIATE)),
                TensorSpec(f"{stem}.gate_proj.weight", "BF16", (INTERMEDIATE, HIDDEN)),
                TensorSpec(f"{stem}.up_proj.weight", "BF16", (INTERMEDIATE, HIDDEN)),
            ]
        name = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        weight_map.update({tensor.name: name for tensor in tensors})
        with (directory / name).open("wb") as file:
            file.write(build_header(tensors))
            for tensor in tensors:
                file.write(os.urandom(tensor.size))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    subprocess.run(["sync", "-f", str(directory)], check=True)
    return sum(path.stat().st_size for path in directory.iterdir())


def timed(work: str, source: Path, destination: Path) -> float:
    """Seconds of one copy or conversion, to disk."""
    start = time.perf_counter()
    if work == "cp":
        subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
        subprocess.run(["sync", "-f", str(destination)], check=True)
    else:
        convert(source, destination)
    seconds = time.perf_counter() - start
    if work != "cp" and not inspect(destination).ok:
        raise SystemExit("the converted directory is damaged")
    shutil.rmtree(destination)
    return seconds


def main() -> None:
    """Make the checkpoint, take turns, print the best of each."""
    root = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        size = write_checkpoint(root / "source")
        times: dict[str, list[float]] = {"cp": [], "convert": []}
        for _ in range(ROUNDS):
            for work, seconds in times.items():
                seconds.append(timed(work, root / "source", root / "destination"))
        for work, seconds in times.items():
            spread = ", ".join(f"{value:.2f} s" for value in seconds)
            print(f"{work:8s} {size / min(seconds) / 1e6:8.0f} MB/s   ({spread} for {size / 1e9:.2f} GB)")
        print(f"ratio    {min(times['cp']) / min(times['convert']):8.2f}x the speed of copying (target 0.5x)")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
