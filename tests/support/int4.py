"""Experts in 4 bits as compressed-tensors publishes them, and what they mean: packed and unpacked bit by bit."""

from __future__ import annotations

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


def pack_experts(tensors: Tensors, *, zero_points: bool = False) -> Tensors:
    """A checkpoint's tensors with the routed experts' matrices packed, the rest as it is."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if ".experts." in key and key.endswith("_proj.weight"):
            stem = key.removesuffix(".weight")
            out.update({stem + kind: part for kind, part in quantised(tensor, zero_points=zero_points).items()})
        else:
            out[key] = tensor
    return out


def quantised(weight: torch.Tensor, *, zero_points: bool = False) -> Tensors:
    """The tensors of a matrix [N, K], by the ends of their names; K is a multiple of GROUP."""
    import torch

    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, GROUP)  # [N, G, GROUP]
    low = groups.amin(2) if zero_points else -groups.abs().amax(2)
    high = groups.amax(2) if zero_points else groups.abs().amax(2)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()  # [N, G]
    zero = (-low / scale.float()).round().clamp(0, 15) if zero_points else torch.full_like(low, 8)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).long().view(rows, columns)
    parts = {PACKED: pack(codes), SCALE: scale, SHAPE: torch.tensor([rows, columns])}
    if zero_points:
        parts[ZERO] = pack(zero.long().t()).t().contiguous()  # [ceil(N / 8), G]
    return parts


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
    """Packed matrices in fp32, which has room for every product of a code and a scale; the rest as it is."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith(PACKED):
            stem = key.removesuffix(PACKED)
            rows, columns = tensors[stem + SHAPE].tolist()
            scale = tensors[stem + SCALE].float()  # [N, G]
            zero = unpack(tensors[stem + ZERO].t(), rows).t() if stem + ZERO in tensors else 8 * scale.new_ones(1, 1)
            codes = unpack(tensor, columns).float().view(rows, -1, GROUP)  # [N, G, GROUP]
            out[f"{stem}.weight"] = ((codes - zero.float()[..., None]) * scale[..., None]).view(rows, columns)
        elif not key.endswith((SCALE, SHAPE, ZERO)):
            out[key] = tensor
    return out
