"""The header of a safetensors file: reading it from bytes, and writing one whose data starts at a page boundary.

A file is an 8-byte little-endian length, that many bytes of JSON (padded with spaces), and the tensors' bytes, each at
`data_offsets` relative to the end of the header, without holes (format: safetensors README, "Format"). This module
checks all of it against the size of the file before a caller believes any offset. It opens no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import limits
from .errors import CheckpointError
from .manifest import ITEM_SIZE

PREFIX_SIZE = 8  # bytes: the length of the JSON
PAGE_SIZE = 4096  # data of files we write starts at a multiple of this, for O_DIRECT and mmap

_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor of a file; `offset` counts from the start of the file."""

    dtype: str  # safetensors name, e.g. "BF16"
    shape: tuple[int, ...]
    offset: int
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def json_length(prefix: bytes, file_size: int) -> int:
    """Length of the JSON that follows the first eight bytes of a file. Raises CheckpointError where it cannot be."""
    if len(prefix) < PREFIX_SIZE:
        raise CheckpointError(f"a file of {file_size} bytes is too short to be a safetensors file")
    length = int.from_bytes(prefix[:PREFIX_SIZE], "little")
    if length > limits.MAX_SAFETENSORS_HEADER:
        raise CheckpointError(f"a header of {length} bytes: not a safetensors file")
    if PREFIX_SIZE + length > file_size:
        raise CheckpointError(f"truncated: the header alone has {length} bytes, the file {file_size}")
    return length


def parse_header(text: bytes, file_size: int) -> dict[str, TensorSpan]:
    """The tensors of a file of `file_size` bytes whose JSON is `text`, in file order. Raises CheckpointError."""
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError("the safetensors header is not a JSON object")
    document.pop(_METADATA, None)
    start = PREFIX_SIZE + len(text)
    spans = {name: _span(name, entry, start) for name, entry in document.items()}
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_gapless(ordered, start, file_size)
    return ordered


def build_header(tensors: Sequence[TensorSpec]) -> bytes:
    """Length prefix and JSON of a file that holds `tensors` in this order, padded to a multiple of PAGE_SIZE."""
    document: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.size]
        document[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_SIZE + len(text)) % PAGE_SIZE)
    return len(text).to_bytes(PREFIX_SIZE, "little") + text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise CheckpointError("the safetensors header names something twice")
    return out


def _span(name: str, entry: Any, start: int) -> TensorSpan:
    if not isinstance(entry, Mapping) or set(entry) != _ENTRY_KEYS:
        raise CheckpointError(f"tensor {name}: malformed header entry")
    dtype, shape, offsets = entry["dtype"], _sizes(name, entry["shape"]), _sizes(name, entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(f"tensor {name}: dtype {dtype!r} is not known to this build")
    if len(shape) > limits.MAX_DIMENSIONS or len(offsets) != 2:
        raise CheckpointError(f"tensor {name}: malformed shape or offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZE[dtype]:
        raise CheckpointError(f"tensor {name}: {end - begin} bytes do not fit shape {list(shape)} of {dtype}")
    return TensorSpan(dtype, shape, start + begin, end - begin)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 53 for item in value):
        raise CheckpointError(f"tensor {name}: malformed shape or offsets")
    return tuple(value)


def _check_gapless(spans: Mapping[str, TensorSpan], start: int, file_size: int) -> None:
    position = start
    for name, span in spans.items():
        if span.offset != position:
            raise CheckpointError(f"tensor {name}: a hole or an overlap before byte {span.offset}")
        position += span.size
    if position > file_size:
        raise CheckpointError(f"truncated: the header describes {position} bytes, the file has {file_size}")
    if position < file_size:
        raise CheckpointError(f"{file_size - position} bytes after the last tensor belong to nothing")
