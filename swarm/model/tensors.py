"""Tensors as views of a shard's bytes.

Owns the mapping from the manifest's names of dtypes and packings to torch's and the kernels', and the memory layout:
all tensors of one shard share one storage, so that neighbours can be joined without a copy. Trusts the bytes: whoever
calls has verified them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from moehive.kernels.repacking import TurnedPacking
from moehive.protocol.errors import ManifestError
from moehive.protocol.manifest import QuantMethod, TensorEntry

TORCH_DTYPE: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
TURNED_PACKING: Final[Mapping[QuantMethod, TurnedPacking]] = {  # the others need no turning
    QuantMethod.INT4_AWQ: TurnedPacking.AWQ,
    QuantMethod.INT4_GPTQ: TurnedPacking.GPTQ,
    QuantMethod.INT4_GPTQ_V2: TurnedPacking.GPTQ_V2,
}
ALIGNMENT: Final = 64  # bytes; a cache line and the widest vector registers

_EXPERT_NAME = re.compile(r".*\.experts\.(?:\d+\.)?(?P<short>.+)")


def empty_bytes(size: int, aligned_offset: int = 0) -> Tensor:
    """An uninitialised writable byte buffer [size] whose byte at `aligned_offset` lies on a 64-byte boundary.

    GEMV kernels are faster on aligned weights, and some of them round differently on others.
    """
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -(room.data_ptr() + aligned_offset) % ALIGNMENT
    return room[start : start + size]


def first_offset(table: Mapping[str, TensorEntry]) -> int:
    """Where a shard's tensors begin, in bytes: what `empty_bytes` should align."""
    return min((entry.offset for entry in table.values()), default=0)


def as_byte_tensor(buffer: bytearray | Tensor) -> Tensor:
    """A writable buffer as a uint8 tensor [size] on the same memory."""
    if isinstance(buffer, Tensor):
        return buffer
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)


def tensors_of(buffer: bytearray | Tensor, table: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The tensors of one shard by their names in `table`, in its order: views of `buffer`, which has the whole shard.

    A tensor that does not lie at a multiple of its item size is copied. Raises ManifestError when one lies outside.
    """
    data = as_byte_tensor(buffer)
    return {name: _view(data, name, entry) for name, entry in table.items()}


def _view(data: Tensor, name: str, entry: TensorEntry) -> Tensor:
    if entry.offset + entry.size > data.numel():
        raise ManifestError(f"tensor {name}: lies outside its shard of {data.numel()} bytes")
    dtype, raw = TORCH_DTYPE[entry.dtype], data[entry.offset : entry.offset + entry.size]
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)


def short_name(name: str) -> str:
    """The name of an expert's tensor without the path to the expert: `gate_proj.weight`, `gate_up_proj_blocks`."""
    match = _EXPERT_NAME.fullmatch(name)
    return match["short"] if match else name
