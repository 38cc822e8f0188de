"""The expert kernels as they are launched for the target models, as builds for support/aot.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from support.aot import Build, Dtype
from support.random_experts import CLAMPED

from moehive.kernels.expert_ffn import FfnSpec
from moehive.kernels.formats import WeightFormat
from moehive.kernels.gpu.configuration import Configuration, Device, choose
from moehive.kernels.gpu.experts import FP32_ROWS, gate_constants, project_constants
from moehive.kernels.gpu.table import LayerForm, MatrixForm

SWIGLU = FfnSpec()
DEVICES = {80: Device(80, 108), 90: Device(90, 132)}  # A100, H100

_DATA = {WeightFormat.PLAIN: torch.bfloat16, WeightFormat.FP8_BLOCK: torch.float8_e4m3fn,
         WeightFormat.INT8_CHANNEL: torch.int8}  # fmt: skip
_SCALE = {WeightFormat.FP8_BLOCK: torch.float32, WeightFormat.MXFP4: torch.uint8, WeightFormat.PLAIN: None}


@dataclass(frozen=True, slots=True)
class Model:
    """The experts of one layer of a model, all on one device."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    format: WeightFormat
    block: tuple[int, int] = (0, 0)
    zero: bool = False
    transposed: bool = False
    spec: FfnSpec = SWIGLU

    @property
    def form(self) -> LayerForm:
        """As a table has it."""
        return LayerForm(self._matrix(2 * self.inner, self.hidden), self._matrix(self.hidden, self.inner))

    def _matrix(self, rows: int, columns: int) -> MatrixForm:
        packed = self.format in (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
        scale = _SCALE.get(self.format, torch.bfloat16)
        return MatrixForm(
            self.format, (rows, columns), self.transposed,
            rows if self.transposed else columns // 2 if packed else columns,
            -(-columns // self.block[1]) if self.block[1] else 0, self.block, _DATA.get(self.format, torch.uint8),
            scale, torch.bfloat16 if self.spec is CLAMPED else None, self.zero,
        )  # fmt: skip

    def configuration(self, tokens: int, device: Device) -> Configuration:
        """What is chosen for bf16 activations."""
        form = self.form
        matrices = (form.gate_up.problem(2, gated=True), form.down.problem(2, gated=False))
        return choose(tokens * self.top_k, self.experts, *matrices, device)


MODELS = (
    Model("Mixtral bf16", 8, 2, 4096, 14336, WeightFormat.PLAIN),
    Model("Qwen3-30B-A3B bf16", 128, 8, 2048, 768, WeightFormat.PLAIN),
    Model("GPT-OSS bf16 [in, out]", 128, 4, 2880, 2880, WeightFormat.PLAIN, transposed=True, spec=CLAMPED),
    Model("GPT-OSS mxfp4", 128, 4, 2880, 2880, WeightFormat.MXFP4, (1, 32), spec=CLAMPED),
    Model("DeepSeek-V3 fp8", 256, 8, 7168, 2048, WeightFormat.FP8_BLOCK, (128, 128)),
    Model("Kimi-K2 int4 g32", 384, 8, 7168, 2048, WeightFormat.INT4_GROUP, (1, 32)),
    Model("Mixtral int4 g128 zero", 8, 2, 4096, 14336, WeightFormat.INT4_GROUP, (1, 128), zero=True),
    Model("Qwen3-30B-A3B int8", 128, 8, 2048, 768, WeightFormat.INT8_CHANNEL, (1, 0)),
)  # fmt: skip


def builds(models: Sequence[Model], tokens: Sequence[int], sms: Sequence[int]) -> list[Build]:
    """Both projections of each; those that would compile to the same code only once."""
    found: dict[Any, Build] = {}
    for sm in sms:
        for model in models:
            for count in tokens:
                configuration = model.configuration(count, DEVICES[sm])
                for gated in (True, False):
                    build = _build(model, configuration, sm, gated, count * model.top_k)
                    key = (tuple(build.arguments.items()), build.num_warps, build.num_stages, sm)
                    found.setdefault(key, build)
    return list(found.values())


def _build(model: Model, configuration: Configuration, sm: int, gated: bool, rows: int) -> Build:
    form, tile = (
        (model.form.gate_up, configuration.gate_up) if gated else (model.form.down, configuration.down)
    )  # fmt: skip
    constants = project_constants(
        form, model.spec, tile, configuration.block, torch.bfloat16, sm, model.top_k if gated else None
    )
    cut = f"{configuration.block} x {tile.columns} x {tile.inner} w{tile.warps} s{tile.stages}"
    cut += (" swap" if tile.swap else "") + (f" split {tile.split}" if tile.split > 1 else "")
    out = _out(gated, tile.split, rows)
    cut += " fp32" if not gated and out == "*fp32:16" and tile.split == 1 else ""
    name = f"sm_{sm} {'gate_up' if gated else 'down'} {model.name}, {cut}"
    arguments = _types(out, gated) | {name: _plain(value) for name, value in constants.items()}
    return Build(name, "moehive.kernels.gpu.projections:project", sm, arguments, tile.warps, tile.stages)


def finish(splits: int, sm: int) -> Build:
    """What adds a split gate_up."""
    pointers = dict.fromkeys(("rows", "blocks", "count"), "*i32:16")
    arguments = {**pointers, "partials": "*fp32:16", "out": "*bf16:16", "num_rows": "i32", "N": "i32:16"}
    constants = gate_constants(SWIGLU) | {"SPLIT_K": splits, "BM": 16, "BN": 128}
    kernel = "moehive.kernels.gpu.projections:activate_partials"
    return Build(f"sm_{sm} activate {splits} partials", kernel, sm, arguments | constants)


def _out(gated: bool, split: int, rows: int) -> str:
    return "*fp32:16" if split > 1 or (not gated and rows <= FP32_ROWS) else "*bf16:16"


def _types(out: str, gated: bool) -> dict[str, Any]:
    sizes = dict.fromkeys(("N", "K", "stride_x", "stride_w"), "i32:16")
    others = dict.fromkeys(("num_rows", "num_experts", "stride_scale"), "i32")
    pointers = dict.fromkeys(("rows", "blocks", "count"), "*i32:16")
    return {
        **sizes,
        **others,
        **pointers,
        "x": "*bf16:16",
        "table": "*i64:16",
        "out": out,
        "row_weight": None if gated else "*fp32:16",
    }


def _plain(value: Any) -> Any:
    return Dtype(value.name) if isinstance(value, tl.dtype) else value
