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
from .configuration import Configuration, Device, Override, Tile, active_experts, apply, choose
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
_FP32_ROWS: Final = 2048  # outputs of so few rows stay fp32 until they are added: their traffic does not matter


def run_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: ExpertTable | Sequence[ExpertMatrices | None],
    spec: FfnSpec,
    *,
    dtype: torch.dtype | None = None,
    configuration: Configuration | None = None,
    overrides: tuple[Override, ...] = (),
) -> Tensor:
    """Sum of each token's experts times their weights: [T, H] of `dtype` (that of `hidden` by default).

    hidden [T, H] bf16, fp16 or fp32; top_k_index [T, k] int32 or int64, where len(experts) marks a choice that is left
    out; top_k_weights [T, k] floating. Experts that are None add nothing: what a peer computes for another is the part
    of the sum that it holds. A table is better than a list, for which one is made each time.
    `configuration` replaces the one that configuration.py chooses, `overrides` parts of it.

    Products are of `hidden`'s dtype, sums fp32 in a fixed order: the same call gives the same bits. No atomics, no
    synchronisation with the host, so it can be captured into a CUDA graph. Raises ValueError for tensors that do not
    fit each other.
    """
    table = experts if isinstance(experts, ExpertTable) else ExpertTable.of(experts, hidden.device)
    _check(hidden, top_k_index, top_k_weights, table)
    dtype = dtype or hidden.dtype
    if table.form is None or not top_k_index.numel():
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    if configuration is None:
        configuration = choose_for(top_k_index.numel(), hidden, table, overrides)
    layer = _Layer(table.form, spec, configuration, _device(hidden.device), hidden.dtype, top_k_index.shape[1])
    aligned = align_rows(top_k_index, len(table), configuration.block, table.expert_map)
    inner = layer.gate_up(hidden, aligned, table)  # [T * k, I]
    outputs = layer.down(inner, aligned, table, top_k_weights)  # [T * k, H] or [S, T * k, H]
    return combine(outputs, top_k_index, len(table), expert_map=table.expert_map, dtype=dtype)


def choose_for(rows: int, hidden: Tensor, table: ExpertTable, overrides: tuple[Override, ...] = ()) -> Configuration:
    """What `run_experts` would choose for so many rows of that dtype on that device."""
    assert table.form is not None, "a table without experts has no shapes"
    device = _device(hidden.device)
    matrices = (
        table.form.gate_up.problem(hidden.element_size(), gated=True),
        table.form.down.problem(hidden.element_size(), gated=False),
    )
    present = sum(expert is not None for expert in table)
    chosen = choose(rows, max(present, 1), *matrices, device)
    return apply(overrides, chosen, rows / max(active_experts(rows, max(present, 1)), 1.0), *matrices, device)


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
def _device(device: torch.device) -> Device:
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
        constants = self._constants(self.form.gate_up, tile) | {"TOP_K": self.top_k, "GATED": True}
        if tile.split == 1:
            self._launch(tile, hidden, aligned, table.gate_up, None, out, rows, inner, self.form.gate_up, constants)
            return out
        partials = _empty_splits(tile, rows, 2 * inner, hidden.device)  # [S, T * k, 2I]
        self._launch(tile, hidden, aligned, table.gate_up, None, partials, rows, inner, self.form.gate_up, constants)
        gate = {name: constants[name] for name in ("ACTIVATION", "ALPHA", "LIMIT", "INTERLEAVED")}
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
            dtype = torch.float32 if rows <= _FP32_ROWS else self._kept(self.dtype)
            out = torch.empty(rows, hidden, dtype=dtype, device=inner.device)
        constants = self._constants(self.form.down, tile) | {"TOP_K": 1, "GATED": False}
        weights = weights.contiguous().view(-1)  # [T * k]
        self._launch(tile, inner, aligned, table.down, weights, out, rows, hidden, self.form.down, constants)
        return out

    def _launch(
        self, tile: Tile, x: Tensor, aligned: AlignedRows, addresses: Tensor, weights: Tensor | None, out: Tensor,
        rows: int, columns: int, form: MatrixForm, constants: dict[str, Any],
    ) -> None:  # fmt: skip
        x = x if x.stride(1) == 1 else x.contiguous()
        programs = aligned.max_blocks * triton.cdiv(columns, tile.columns)
        if tile.persistent:
            programs = min(programs, self.device.multiprocessors)
        project[(programs, tile.split)](
            x, aligned.rows, aligned.block_expert, aligned.count, addresses, weights, out, rows, columns,
            form.shape[1], addresses.shape[1], x.stride(0), form.stride, form.scale_stride, **constants,
            BM=aligned.block, BN=tile.columns, BK=tile.inner, GM=tile.group, SPLIT_K=tile.split, SWAP=tile.swap,
            PERSISTENT=tile.persistent, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _constants(self, form: MatrixForm, tile: Tile) -> dict[str, Any]:
        clamped = self.spec.gate == CLAMPED_INTERLEAVED
        compute = _DTYPES[self._kept(self.dtype)]
        assert compute is tl.float32 or not INTERPRETED, "the interpreter computes bf16 wrongly"
        return {
            "ACTIVATION": (activations.CLAMPED if clamped else _ACTIVATIONS[self.spec.activation]).value,
            "ALPHA": self.spec.alpha if clamped else 0.0, "LIMIT": self.spec.limit if clamped else 0.0,
            "INTERLEAVED": clamped, "HAS_BIAS": form.bias_dtype is not None, "HAS_ZERO": form.has_zero,
            "FORMAT": _FORMATS[form.format].value, "TRANSPOSED": form.transposed,
            "ROWS": max(form.block[0], 1), "GROUP": max(form.block[1], 1),
            "HARDWARE_FP8": self.device.sm >= 89,
            "WT": _DTYPES[form.data_dtype], "ST": _DTYPES[form.scale_dtype or torch.uint8],
            "BT": _DTYPES[form.bias_dtype or torch.uint8], "CT": compute, "EVEN_K": form.shape[1] % tile.inner == 0,
        }  # fmt: skip

    @staticmethod
    def _kept(dtype: torch.dtype) -> torch.dtype:
        """The dtype of products and of what is kept between kernels; the interpreter has fp32 alone."""
        return torch.float32 if INTERPRETED else dtype


def _empty_splits(tile: Tile, rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(tile.split, rows, columns, dtype=torch.float32, device=device)
