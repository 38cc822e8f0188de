"""AWQ and GPTQ as compressed-tensors packs: the same codes, zero points and scales, with rows as outputs.

Both store a weight the other way round than every kernel reads it, so that each use would turn it. Turned once, when an
expert is read, it is what compressed-tensors would have stored.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from .formats import WeightMatrix, pack_nibbles
from .packings import PER_WORD, awq_matrix, gptq_matrix

_WEIGHT: Final = ".qweight"


class TurnedPacking(enum.Enum):
    """How a weight [in, out] is packed: see the functions of packings.py."""

    AWQ = "awq"
    GPTQ = "gptq"  # zero points minus one
    GPTQ_V2 = "gptq-v2"


def repacked(tensors: Mapping[str, Tensor], packing: TurnedPacking, group: int) -> dict[str, Tensor]:
    """`tensors` with `weight_packed`, `weight_scale`, `weight_shape` and `weight_zero_point` for each `qweight`.

    `qweight`, `qzeros`, `scales` and `g_idx` of one matrix have one name before their last part. Other tensors stay as
    they are. Raises ValueError for ones that are missing or do not fit each other, and for a side that fills no words.
    """
    rest, out = dict(tensors), {}
    for name in tensors:
        if not name.endswith(_WEIGHT):
            continue
        stem = name.removesuffix(_WEIGHT)
        parts = {kind: rest.pop(f"{stem}.{kind}", None) for kind in ("qweight", "qzeros", "scales", "g_idx")}
        matrix = _matrix(stem, parts, packing, group)
        assert matrix.scale is not None
        assert matrix.zero is not None
        if any(side % PER_WORD for side in matrix.shape):
            raise ValueError(f"{stem} is a weight {matrix.shape}, whose sides are no multiples of {PER_WORD}")
        out[f"{stem}.weight_packed"] = matrix.data.view(torch.int32)
        out[f"{stem}.weight_scale"] = matrix.scale
        out[f"{stem}.weight_shape"] = torch.tensor(matrix.shape)
        out[f"{stem}.weight_zero_point"] = _packed_rows(matrix.zero)
    return rest | out


def _matrix(stem: str, parts: Mapping[str, Tensor | None], packing: TurnedPacking, group: int) -> WeightMatrix:
    qweight, qzeros, scales, g_idx = (parts[kind] for kind in ("qweight", "qzeros", "scales", "g_idx"))
    if qweight is None or qzeros is None or scales is None:
        raise ValueError(f"{stem} has no {' or '.join(kind for kind in ('qzeros', 'scales') if parts[kind] is None)}")
    if packing is TurnedPacking.AWQ:
        return awq_matrix(qweight, qzeros, scales, group)
    minus_one = packing is TurnedPacking.GPTQ
    return gptq_matrix(qweight, qzeros, scales, group, g_idx, zeros_minus_one=minus_one)


def _packed_rows(zero: Tensor) -> Tensor:
    """uint8 [N, G] as int32 [N / 8, G], low bits first. N is a multiple of 8, as it is in whole words."""
    return pack_nibbles(zero.t()).clone(memory_format=torch.contiguous_format).view(torch.int32).t()  # of [G, N / 8]
