"""The expert kernels' machine code: no spills, shared memory as reckoned, wide asynchronous loads, the right unit.

A part of what scripts/bench/aot_table.py compiles: every format, few rows and many, both architectures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
from support.aot import SHARED_LIMIT, Build, Report, compile_all
from support.aot_experts import DEVICES, MODELS, Model, builds, finish
from support.aot_route import BUILDS

from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import shared_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # compiling takes 10 s alone, and the first test pays for all

BY_NAME = {model.name: model for model in MODELS}
FEW, MANY = 1, 8192  # tokens
SOURCES = Path(__file__).parents[3] / "kernels" / "gpu"
# (tokens, architecture, models): a choice that has each format, tile and way of loading once
CHOSEN = (
    (FEW, 90, ("Qwen3-30B-A3B bf16", "GPT-OSS bf16 [in, out]", "GPT-OSS mxfp4", "DeepSeek-V3 fp8", "Kimi-K2 int4 g32")),
    (MANY, 90, ("Mixtral bf16", "Kimi-K2 int4 g32", "DeepSeek-V3 fp8")),
    (FEW, 80, ("DeepSeek-V3 fp8", "Mixtral int4 g128 zero", "Qwen3-30B-A3B int8")),
)
FIRST_ONLY = slice(0, 1)  # gate_up: down differs by what it leaves out


def chosen() -> list[tuple[Build, Model, int]]:
    return [
        (build, BY_NAME[name], tokens)
        for tokens, sm, names in CHOSEN
        for name in names
        for build in builds([BY_NAME[name]], [tokens], [sm])[FIRST_ONLY]
    ]


@lru_cache(maxsize=1)
def reports() -> Mapping[str, Report]:
    return compile_all([*(build for build, _, _ in chosen()), *(finish(4, sm) for sm in DEVICES)])


DECODING = [
    pytest.param(build, model, id=build.name) for build, model, tokens in chosen() if tokens == FEW and build.sm == 90
]
ALL = [pytest.param(*entry, id=entry[0].name) for entry in chosen()]


@pytest.mark.parametrize(("build", "model", "tokens"), ALL)
def test_registers_and_shared_memory(build: Build, model: Model, tokens: int) -> None:
    report = reports()[build.name]
    assert report.stack == 0, "registers are spilled"
    assert report.spills == 0
    assert report.blocks_per_sm >= 1
    device = DEVICES[build.sm]
    tile = model.configuration(tokens, device)
    reckoned = shared_memory(tile.gate_up, tile.block, model.form.gate_up.problem(2, gated=True), device)
    assert report.shared <= reckoned <= SHARED_LIMIT[build.sm]
    if tokens == FEW:
        assert report.blocks_per_sm >= 3, "too few programs beside each other to keep the memory busy"


@pytest.mark.parametrize(("build", "model", "tokens"), ALL)
def test_loads_are_wide_and_asynchronous(build: Build, model: Model, tokens: int) -> None:
    """Both sides of the product come in copies of 16 bytes; only block scales, 4 bytes each, are narrower."""
    report = reports()[build.name]
    assert report.wide_async >= 2 * (build.num_stages - 1), "a side of the product is loaded through registers"
    allowed = 4 * build.num_stages if model.format is WeightFormat.FP8_BLOCK else 0
    assert report.narrow_async <= allowed, "something is copied in small pieces"


@pytest.mark.parametrize(("build", "model", "tokens"), ALL)
def test_matrix_instructions(build: Build, model: Model, tokens: int) -> None:
    report = reports()[build.name]
    if build.sm == 90 and tokens == MANY:
        assert report.wgmma > 0
        assert report.mma == 0, "warp instructions reach half the rate"
    else:
        assert report.mma > 0


@pytest.mark.parametrize(("build", "model"), DECODING)
def test_decoding_leaves_the_memory_busy(build: Build, model: Model) -> None:
    """Instructions of the loop against bytes of weights: at one instruction a cycle from each of four schedulers, an
    H100 at 1.755 GHz must be able to decode half of 4.3 TB/s for 4-bit weights, and all of it for the others."""
    report, arguments = reports()[build.name], build.arguments
    matrix = model.form.gate_up.problem(2, gated=True)
    weights = 2 * arguments["BN"] * arguments["BK"] * matrix.weight_bits / 8  # bytes in a turn of the loop
    cycles = report.warps * report.loop / 4
    rate = weights / cycles * 132 * 1.755e9
    assert rate > (0.45 if matrix.weight_bits == 4 else 1.0) * 4.3e12


@pytest.mark.parametrize("sm", DEVICES)
def test_what_finishes_a_split_sum(sm: int) -> None:
    report = reports()[finish(4, sm).name]
    assert report.stack == 0
    assert report.registers <= 128
    assert report.wide_loads >= 8, "gate and up of each split"


@pytest.mark.parametrize("sm", DEVICES)
def test_every_kernel_is_compiled_here_or_with_the_routers(sm: int) -> None:
    """For both architectures: all that any of our code launches."""
    texts = {path.stem: path.read_text() for path in SOURCES.glob("*.py")}
    kernels = [
        (module, name) for module, text in texts.items() for name in re.findall(r"@triton\.jit.*\ndef (\w+)\(", text)
    ]
    launched = {
        f"moehive.kernels.gpu.{module}:{name}"
        for module, name in kernels
        if any(re.search(rf"\b{name}\[.*\]\(", text) for text in texts.values())
    }
    compiled = [*(build for build, _, _ in chosen()), finish(4, sm), *BUILDS]
    assert len(launched) == 12
    assert {build.kernel for build in compiled if build.sm == sm} == launched
