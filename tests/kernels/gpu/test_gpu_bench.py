"""The parts of the GPU benchmark that need no GPU, and all of it once under the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from gpu_bench import __main__ as bench
from gpu_bench import data, roofline, shapes, tuning
from gpu_bench.roofline import H200, Ceilings

from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import Device, Matrix, choose
from moehive.kernels.gpu.overrides import apply_overrides, load_overrides

ROOT = Path(__file__).parents[3]
LAYERS = {layer.name.split()[0]: layer for layer in shapes.LAYERS}

# The project's kernel reference, section 6: microseconds on an H200
IDEAL = {
    "Mixtral-8x7B": {1: 164, 16: 650, 64: 658, 8192: 7307},
    "Qwen3-30B-A3B": {1: 17.6, 16: 181, 64: 278, 8192: 783},
    "GPT-OSS-120B": {1: 12.3, 16: 157, 64: 344, 8192: 2064},
    "DeepSeek-V3": {1: 82, 16: 1046, 64: 2284, 8192: 7307},
    "Kimi-K2": {1: 46, 16: 634, 64: 1642, 8192: 7307},
}


@pytest.mark.parametrize(("name", "tokens"), [(name, tokens) for name, times in IDEAL.items() for tokens in times])
def test_ideal_times_are_those_of_the_reference(name: str, tokens: int) -> None:
    layer = LAYERS[name]
    found = roofline.bound(layer, tokens, roofline.expected_active(layer, tokens), tokens * layer.top_k, H200)
    assert found.ideal * 1e6 == pytest.approx(IDEAL[name][tokens], rel=0.01)


def demand(name: str, tokens: int, ceilings: Ceilings = H200) -> float:
    """Of the ideal time, how many times as much is allowed."""
    layer = LAYERS[name]
    active = roofline.expected_active(layer, tokens)
    limits = roofline.bound(layer, tokens, active, tokens * layer.top_k, ceilings)
    return roofline.demanded(layer, tokens, active, limits, ceilings) / limits.ideal


def test_demands_are_those_of_the_reference() -> None:
    assert demand("DeepSeek-V3", 16) == pytest.approx(1 / 0.8)  # decoding, more than 1 GB
    assert demand("Kimi-K2", 64) == pytest.approx(1 / 0.5)  # 4 bits
    assert demand("Mixtral-8x7B", 1) == pytest.approx((40 + 164 / 0.85) / 164, rel=0.01)  # less than 1 GB
    assert demand("Mixtral-8x7B", 8192) == pytest.approx(1 / 0.55)  # 2048 rows an expert
    assert demand("GPT-OSS-120B", 8192) == pytest.approx(1 / 0.4, rel=0.01)  # 256 rows, decoded in the loop
    assert demand("Mixtral-8x7B", 512) == pytest.approx(1 / 0.7, rel=0.01)  # 128 rows
    assert demand("Kimi-K2", 1, Ceilings(1e12, 790e12)) < demand("Kimi-K2", 1)  # the fixed cost weighs less


def test_calls_take_turns_through_all_experts() -> None:
    """So that what a call reads is not what the call before it has left in the cache."""
    calls = data.make_calls(LAYERS["Qwen3-30B-A3B"], 4, 8, torch.Generator().manual_seed(0))
    for first in (0, 4):  # 4 calls of 32 choices deal out 128 experts
        assert torch.cat([call.index.reshape(-1) for call in calls[first : first + 4]]).unique().numel() == 128
    assert all(call.active() == 32 and call.padded_rows(16) == 32 * 16 for call in calls)
    many = data.make_calls(LAYERS["Mixtral-8x7B"], 64, 2, torch.Generator().manual_seed(0))
    assert not torch.equal(many[0].index, many[1].index)
    assert all(call.index.sort(1).values.diff(dim=1).min() > 0 for call in many)  # a token's experts are distinct


def test_tuning_tries_what_can_run_and_writes_what_can_be_read(tmp_path: Path) -> None:
    device = Device(90, 132)
    gate_up = Matrix(2048, 7168, WeightFormat.INT4_GROUP, 32, gated=True)
    down = Matrix(7168, 2048, WeightFormat.INT4_GROUP, 32)
    chosen = choose(64, 384, gate_up, down, device)
    found = list(tuning.neighbours(chosen, gate_up, down, device))
    assert chosen not in found
    assert len(set(found)) == len(found) > 10
    best = found[3]
    (tmp_path / "o.json").write_text(json.dumps([tuning.as_override(best, 2.0, gate_up, device)]))
    overrides = load_overrides(tmp_path / "o.json")
    assert apply_overrides(overrides, chosen, 1.5, gate_up, down, device) == best
    assert apply_overrides(overrides, chosen, 9.0, gate_up, down, device) == chosen


def test_arguments() -> None:
    options = bench.parse(["--layers", "Kimi", "Qwen3", "--tokens", "1", "64"])
    assert [layer.name.split()[0] for layer in bench.selected(options.layers)] == ["Qwen3-30B-A3B", "Kimi-K2"]
    assert options.tokens == [1, 64]
    assert bench.selected(None) == list(shapes.LAYERS)
    with pytest.raises(SystemExit) as ended:
        bench.parse(["--layers", "Llama"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    """Shell, import path, correctness, timing, baselines and report: what a GPU would run, on two tiny layers."""
    command = [str(ROOT / "scripts/bench/gpu.sh"), "--dry-run", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "correctness: 2 of 2 within" in ended.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [result["layer"] for result in report["results"]] == [layer.name for layer in shapes.TINY]
    assert all(result["grouped_mm"] > 0 and result["loop"] > 0 for result in report["results"])
    assert not report["wrong"] + report["broken"] + report["left_out"]


IMPORT = """
import sys
import moehive.kernels.gpu.experts, moehive.kernels.gpu.overrides
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_the_kernels_import_torch_and_triton_alone() -> None:
    """They have to run on a machine that has nothing else."""
    ended = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    found = set(json.loads(ended.stdout.replace("'", '"')))
    assert {"torch", "triton"} <= found
    others = "transformers safetensors hivemind libp2p anyio msgpack cryptography structlog psutil rich cyclopts blake3"
    assert not found & {*others.split(), "huggingface_hub", "tokenizers", "accelerate"}
