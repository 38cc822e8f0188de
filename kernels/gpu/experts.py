"""The experts of one layer on the rows routed to them, on the GPU: align, project, activate, project, combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from moehive.kernels.expert_ffn import CLAMPED_INTERLEAVED, FfnSpec
from moehive.kernels.formats import ExpertMatrices, WeightFormat

from . import activations, tiles
from .align import AlignedRows, align_rows
from .combine import combine
from .configuration import Configuration, Device, Matrix, Tile, active_experts, check, choose
from .overrides import Override, apply_overrides
from .projections import activate_partials, project
from .table import ExpertTable, LayerForm, MatrixForm

INTERPRETED: Final = not isinstance(project, triton.JITFunction)  # TRITON_INTERPRET=1 when triton was imported

_DTYPES: Final = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8,
    torch.int8: tl.int8, torch.float8_e4m3fn: tl.uint8,
}  # fmt: skip
_FORMATS: Final = {
    WeightFormat.PLAIN: tiles.PLAIN, WeightFormat.FP8_BLOCK: tiles.FP8_BLOCK,
    WeightFormat.INT8_CHANNEL: tiles.INT8_CHANNEL, WeightFormat.INT4_GROUP: tiles.INT4_GROUP,
    WeightFormat.MXFP4: tiles.MXFP4,
}  # fmt: skip
_ACTIVATIONS: Final = {
    "silu": activations.SILU, "swish": activations.SILU, "gelu": activations.GELU,
    "gelu_pytorch_tanh": activations.GELU_TANH, "relu": activations.RELU, "relu2": activations.RELU_SQUARED,
}  # fmt: skip
FP32_ROWS: Final = 2048  # outputs of so few rows stay fp32 until they are added: their traffic does not matter


def run_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: ExpertTable | Sequence[ExpertMatrices | None],
    spec: FfnSpec,
    *,
    dtype: torch.dtype | None = None,
    configuration: Configuration | None = None,
    overrides: Sequence[Override] = (),
    usage: Tensor | None = None,
) -> Tensor:
    """Sum of each token's experts times their weights: [T, H] of `dtype` (that of `hidden` by default).

    hidden [T, H] bf16, fp16 or fp32; top_k_index [T, k] int32 or int64, where len(experts) marks a choice that is left
    out; top_k_weights [T, k] floating. Experts that are None add nothing: what a peer computes for another is the part
    of the sum that it holds. A table is better than a list, for which one is made each time.
    `configuration` replaces the one that configuration.py chooses, `overrides` parts of it.

    `usage` [E] int64, where given, grows by the rows of each expert that is here: telemetry at no cost of its own.

    Products are of `hidden`'s dtype, sums fp32 in a fixed order: the same call gives the same bits. What is kept
    between the steps has `hidden`'s dtype, but for outputs of experts where they are few, which stay fp32. No atomics,
    no synchronisation with the host, so it can be captured into a CUDA graph. Raises ValueError for tensors that do
    not fit each other, and for a configuration that cannot run.
    """
    table = experts if isinstance(experts, ExpertTable) else ExpertTable.of(experts, hidden.device)
    _check(hidden, top_k_index, top_k_weights, table)
    dtype = dtype or hidden.dtype
    if table.form is None or not top_k_index.numel():
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    if configuration is None:
        configuration = choose_for(top_k_index.numel(), hidden, table, overrides)
    else:
        check(configuration, *matrices_of(table, hidden), device_facts(hidden.device))
    layer = _Layer(table.form, spec, configuration, device_facts(hidden.device), hidden.dtype, top_k_index.shape[1])
    aligned = align_rows(top_k_index, len(table), configuration.block, table.expert_map, usage)
    inner = layer.gate_up(hidden, aligned, table)  # [T * k, I]
    outputs = layer.down(inner, aligned, table, top_k_weights)  # [T * k, H] or [S, T * k, H]
    return combine(outputs, top_k_index, len(table), expert_map=table.expert_map, dtype=dtype)


def choose_for(rows: int, hidden: Tensor, table: ExpertTable, overrides: Sequence[Override] = ()) -> Configuration:
    """What `run_experts` would choose for so many rows of that dtype on that device."""
    device, matrices, present = device_facts(hidden.device), matrices_of(table, hidden), max(table.present, 1)
    chosen = choose(rows, present, *matrices, device)
    return apply_overrides(overrides, chosen, rows / max(active_experts(rows, present), 1.0), *matrices, device)


def matrices_of(table: ExpertTable, hidden: Tensor) -> tuple[Matrix, Matrix]:
    """gate_up and down as the choice of configuration sees them."""
    assert table.form is not None, "a table without experts has no shapes"
    element = hidden.element_size()
    return table.form.gate_up.problem(element, gated=True), table.form.down.problem(element, gated=False)


def _check(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, table: ExpertTable) -> None:
    if hidden.ndim != 2 or top_k_index.ndim != 2 or top_k_index.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and choices {tuple(top_k_index.shape)} are not [T, H] and [T, k]"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(f"weights {tuple(top_k_weights.shape)} for choices {tuple(top_k_index.shape)}")
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden is {hidden.dtype}, not bfloat16, float16 or float32")
    if table.form is not None and hidden.shape[1] != table.form.down.shape[0]:
        raise ValueError(f"hidden has {hidden.shape[1]} columns, the experts {table.form.down.shape[0]}")


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> Device:
    """Facts about the GPU; for the interpreter, which has none, an H100's."""
    if device.type != "cuda":
        return Device(90, 132)
    major, minor = torch.cuda.get_device_capability(device)
    return Device(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One call: the launches of the two projections."""

    form: LayerForm
    spec: FfnSpec
    configuration: Configuration
    device: Device
    dtype: torch.dtype  # of hidden
    top_k: int

    def gate_up(self, hidden: Tensor, aligned: AlignedRows, table: ExpertTable) -> Tensor:
        """Activated [T * k, I] from hidden [T, H]."""
        tile, rows = self.configuration.gate_up, hidden.shape[0] * self.top_k
        inner = self.form.down.shape[1]
        out = torch.empty(rows, inner, dtype=self._kept(self.dtype), device=hidden.device)  # [T * k, I]
        if tile.split == 1:
            self._launch(tile, hidden, aligned, table.gate_up, None, out, inner, self.form.gate_up, gated=True)
            return out
        partials = _empty_splits(tile, rows, 2 * inner, hidden.device)  # [S, T * k, 2I]
        self._launch(tile, hidden, aligned, table.gate_up, None, partials, inner, self.form.gate_up, gated=True)
        gate = gate_constants(self.spec)
        activate_partials[(aligned.max_blocks, triton.cdiv(inner, 128))](
            partials, aligned.rows, aligned.block_expert, aligned.count, out, rows, inner,
            **gate, SPLIT_K=tile.split, BM=aligned.block, BN=128, num_warps=4,
        )  # fmt: skip
        return out

    def down(self, inner: Tensor, aligned: AlignedRows, table: ExpertTable, weights: Tensor) -> Tensor:
        """Weighted [T * k, H] from [T * k, I]; where the inner dimension is split [S, T * k, H]."""
        tile, (rows, hidden) = self.configuration.down, (inner.shape[0], self.form.down.shape[0])
        if tile.split > 1:
            out = _empty_splits(tile, rows, hidden, inner.device)
        else:
            dtype = torch.float32 if rows <= FP32_ROWS else self._kept(self.dtype)
            out = torch.empty(rows, hidden, dtype=dtype, device=inner.device)
        weights = weights.contiguous().view(-1)  # [T * k]
        self._launch(tile, inner, aligned, table.down, weights, out, hidden, self.form.down, gated=False)
        return out

    def _launch(
        self, tile: Tile, x: Tensor, aligned: AlignedRows, addresses: Tensor, weights: Tensor | None, out: Tensor,
        columns: int, form: MatrixForm, *, gated: bool,
    ) -> None:  # fmt: skip
        x = x if x.stride(1) == 1 else x.contiguous()
        programs = aligned.max_blocks * triton.cdiv(columns, tile.columns)
        if tile.persistent:
            programs = min(programs, self.device.multiprocessors)
        constants = project_constants(
            form, self.spec, tile, aligned.block, self._kept(self.dtype), self.device.sm, self.top_k if gated else None
        )
        project[(programs, tile.split)](
            x, aligned.rows, aligned.block_expert, aligned.count, addresses, weights, out, out.shape[-2], columns,
            form.shape[1], addresses.shape[1], x.stride(0), form.stride, form.scale_stride, **constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    @staticmethod
    def _kept(dtype: torch.dtype) -> torch.dtype:
        """The dtype of products and of what is kept between kernels; the interpreter has fp32 alone."""
        return torch.float32 if INTERPRETED else dtype


def gate_constants(spec: FfnSpec) -> dict[str, Any]:
    """The constexpr arguments that say what stands between the projections."""
    clamped = spec.gate == CLAMPED_INTERLEAVED
    activation = activations.CLAMPED if clamped else _ACTIVATIONS[spec.activation]
    return {
        "ACTIVATION": activation.value, "ALPHA": spec.alpha if clamped else 0.0,
        "LIMIT": spec.limit if clamped else 0.0, "INTERLEAVED": clamped,
    }  # fmt: skip


def project_constants(
    form: MatrixForm, spec: FfnSpec, tile: Tile, block: int, compute: torch.dtype, sm: int, top_k: int | None
) -> dict[str, Any]:
    """All constexpr arguments of `project`; `top_k` for gate_up, None for down."""
    assert compute is torch.float32 or not INTERPRETED, "the interpreter computes bf16 wrongly"
    return gate_constants(spec) | {
        "TOP_K": top_k or 1, "GATED": top_k is not None, "HAS_BIAS": form.bias_dtype is not None,
        "HAS_ZERO": form.has_zero, "FORMAT": _FORMATS[form.format].value, "TRANSPOSED": form.transposed,
        "ROWS": max(form.block[0], 1), "GROUP": max(form.group, 1), "HARDWARE_FP8": sm >= 89,
        "WT": _DTYPES[form.data_dtype], "ST": _DTYPES[form.scale_dtype or torch.uint8],
        "BT": _DTYPES[form.bias_dtype or torch.uint8], "CT": _DTYPES[compute],
        "EVEN_K": form.shape[1] % tile.inner == 0, "BM": block, "BN": tile.columns, "BK": tile.inner,
        "GM": tile.group, "SPLIT_K": tile.split, "SWAP": tile.swap, "PERSISTENT": tile.persistent,
    }  # fmt: skip


def _empty_splits(tile: Tile, rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(tile.split, rows, columns, dtype=torch.float32, device=device)
