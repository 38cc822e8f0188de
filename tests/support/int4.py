"""Experts in 4 bits as compressed-tensors publishes them, and what they mean: packed and unpacked bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

GROUP = 32  # columns that share a scale, as in Kimi-K2-Thinking
PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"

# As in Kimi-K2-Thinking's config.json, with the observer's settings left out.
CONFIG: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
                "strategy": "group", "symmetric": True, "type": "int",
            },
        },
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


# As AutoAWQ and AutoGPTQ write them.
AWQ_CONFIG: dict[str, Any] = {
    "bits": 4, "group_size": GROUP, "modules_to_not_convert": ["mlp.gate"], "quant_method": "awq", "version": "gemm",
    "zero_point": True,
}  # fmt: skip
GPTQ_CONFIG: dict[str, Any] = {
    "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.1, "desc_act": False, "group_size": GROUP,
    "quant_method": "gptq", "sym": True, "true_sequential": True,
}  # fmt: skip


def pack_experts(tensors: Tensors, *, zero_points: bool = False, dense: bool = False) -> Tensors:
    """A checkpoint's tensors with the matrices of the routed experts packed, or, with `dense`, of all projections."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if _is_projection(key) and (dense or ".experts." in key):
            stem = key.removesuffix(".weight")
            out.update({stem + kind: part for kind, part in quantised(tensor, zero_points=zero_points).items()})
        else:
            out[key] = tensor
    return out


def pack_turned(tensors: Tensors, pack_one: Callable[..., Tensors]) -> Tensors:
    """A checkpoint's tensors with all projections as `awq` or `gptq` pack them; the rest as it is."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if _is_projection(key):
            parts = pack_one(*_numbers(tensor, zero_points=True, dtype="float16"))
            out.update({f"{key.removesuffix('.weight')}.{kind}": part for kind, part in parts.items()})
        else:
            out[key] = tensor
    return out


def _is_projection(key: str) -> bool:
    return key.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def quantised(weight: torch.Tensor, *, zero_points: bool = False) -> Tensors:
    """The tensors of a matrix [N, K], by the ends of their names; K is a multiple of GROUP."""
    import torch

    codes, zero, scale = _numbers(weight, zero_points=zero_points, dtype="bfloat16")
    parts = {PACKED: pack(codes), SCALE: scale, SHAPE: torch.tensor(weight.shape)}
    if zero_points:
        parts[ZERO] = pack(zero.t()).t().contiguous()  # [ceil(N / 8), G]
    return parts


def _numbers(weight: torch.Tensor, *, zero_points: bool, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K] and zero points [N, G], int64, and scales [N, G]."""
    import torch

    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, GROUP)  # [N, G, GROUP]
    low = groups.amin(2) if zero_points else -groups.abs().amax(2)
    high = groups.amax(2) if zero_points else groups.abs().amax(2)
    scale = ((high - low) / 15).clamp(min=1e-6).to(getattr(torch, dtype))  # [N, G]
    zero = (-low / scale.float()).round().clamp(0, 15) if zero_points else torch.full_like(low, 8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.long().view(rows, columns), zero.long(), scale


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int64 [R, C] of 0 to 15 as int32 [R, ceil(C / 8)]: column 8 j + i in bits 4 i to 4 i + 3 of word j."""
    import torch
    import torch.nn.functional as F

    padded = F.pad(codes, (0, -codes.shape[1] % 8)).view(codes.shape[0], -1, 8)
    words = sum(padded[:, :, i] << 4 * i for i in range(8))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack`."""
    import torch

    nibbles = [words.long() >> 4 * i & 15 for i in range(8)]
    return torch.stack(nibbles, -1).flatten(1)[:, :columns]


def exact(tensors: Tensors) -> Tensors:
    """What a checkpoint means: packed experts in fp32, which has room for every product of a code and a scale; other
    packed matrices rounded to the dtype of their scales; the rest as it is."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith((PACKED, ".qweight")):
            stem = key.rpartition(".")[0]
            codes, zero, scale = _unpacked(tensors, stem)
            rows, columns = codes.shape
            groups = codes.float().view(rows, -1, GROUP) - zero.float()[..., None]  # [N, G, GROUP]
            values = (groups * scale.float()[..., None]).view(rows, columns)
            out[f"{stem}.weight"] = values if ".experts." in key else values.to(scale.dtype)
        elif not key.endswith((SCALE, SHAPE, ZERO, ".qzeros", ".scales", ".g_idx")):
            out[key] = tensor
    return out


def _unpacked(tensors: Tensors, stem: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The numbers of one matrix, as `_numbers` makes them; GPTQ with zero points minus one."""
    if stem + PACKED in tensors:
        rows, columns = tensors[stem + SHAPE].tolist()
        scale = tensors[stem + SCALE]
        zero = unpack(tensors[stem + ZERO].t(), rows).t() if stem + ZERO in tensors else 8 * scale.new_ones(1, 1)
        return unpack(tensors[stem + PACKED], columns), zero, scale
    qweight, qzeros = tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"]
    scale = tensors[f"{stem}.scales"].t()
    if f"{stem}.g_idx" in tensors:
        return unpack(qweight.t(), 8 * len(qweight)), (unpack(qzeros, len(scale)) + 1).t() % 16, scale
    return _awq_numbers(qweight).t(), _awq_numbers(qzeros).t(), scale


def _awq_numbers(words: torch.Tensor) -> torch.Tensor:
    """[R, C] to [R, 8 C]."""
    import torch

    nibbles = unpack(words, 8 * words.shape[1]).view(len(words), -1, 8)
    out = torch.empty_like(nibbles)
    for nibble, column in enumerate(_AWQ_ORDER):
        out[:, :, column] = nibbles[:, :, nibble]
    return out.flatten(1)


# --- AWQ and GPTQ -------------------------------------------------------------------------------------------------

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, awq/utils/packing_utils.py: nibble i of a word has this column of it


def awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Tensors:
    """A matrix of codes [N, K], zero points and scales [N, G] as AutoAWQ's "gemm" stores it."""
    import torch

    def words(values: torch.Tensor) -> torch.Tensor:  # [R, N] to [R, N / 8]
        return pack(values.view(len(values), -1, 8)[:, :, torch.tensor(_AWQ_ORDER)].flatten(1))

    return {
        "qweight": words(codes.t().contiguous()),
        "qzeros": words(zeros.t().contiguous()),
        "scales": _turned(scales),
    }


def gptq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, *, minus_one: bool = True) -> Tensors:
    """The same as AutoGPTQ stores it, zero points minus one, or, without that, as "gptq_v2"."""
    import torch

    return {
        "qweight": _turned(pack(codes)),  # [K / 8, N]
        "qzeros": pack(_turned((zeros - 1) % 16 if minus_one else zeros)),  # [G, N / 8]
        "scales": _turned(scales),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.t().contiguous()
