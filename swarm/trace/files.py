"""Traces and predictors as files: safetensors with a few named arrays, and everything else in its metadata.

The format is versioned; a file of another version is refused rather than guessed at. A length from the file is believed
only after it was compared with the file's size, which itself is bounded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moehive.protocol.errors import CheckpointError, DestinationError, StorageError, TraceError
from moehive.protocol.safetensors_header import PREFIX_SIZE, json_length

from .routing import HiddenSamples, RoutingTrace

MAX_FILE_BYTES: Final = 2 << 30
_FORMAT: Final = "moehive-trace"
_VERSION: Final = "1"
_MAX_LAYERS: Final = 4096
_MAX_EXPERTS: Final = 0xFFFF

Arrays = Mapping[str, NDArray[Any]]


def write_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace; whoever opens `path` sees the old file or the whole new one. Raises StorageError."""
    replace_file(path, trace_bytes(trace))


def read_trace(path: Path) -> RoutingTrace:
    """Read what `write_trace` wrote. Raises TraceError for anything else, StorageError."""
    return trace_from_bytes(read_bounded(path), str(path))


def trace_bytes(trace: RoutingTrace) -> bytes:
    """The file's content: one byte per expert number where that is enough."""
    small = np.uint8 if trace.num_experts <= 1 << 8 else np.uint16
    arrays: dict[str, NDArray[Any]] = {
        "tokens": trace.tokens,
        "starts": trace.starts.astype(np.uint8),
        "experts": trace.experts.astype(small),
    }
    if trace.samples is not None:
        arrays |= {"rows": trace.samples.rows, "inputs": trace.samples.inputs, "residuals": trace.samples.residuals}
    facts = {"model": trace.model, "layers": list(trace.layers), "numExperts": trace.num_experts}
    return pack(_FORMAT, _VERSION, facts, arrays)


def trace_from_bytes(data: bytes, name: str = "trace") -> RoutingTrace:
    """The trace that `trace_bytes` gave. Raises TraceError."""
    facts, arrays = unpack(data, _FORMAT, _VERSION, name)
    model, layers, experts = (facts.get(fact) for fact in ("model", "layers", "numExperts"))
    if not (isinstance(model, str) and isinstance(layers, list) and isinstance(experts, int)):
        raise TraceError(f"{name}: its model, layers or number of experts cannot be")
    if not 0 < experts <= _MAX_EXPERTS or not 0 < len(layers) <= _MAX_LAYERS:
        raise TraceError(f"{name}: its model, layers or number of experts cannot be")
    if not all(isinstance(layer, int) for layer in layers) or layers != sorted(set(layers)) or layers[0] < 0:
        raise TraceError(f"{name}: its layers are not ascending numbers")
    return RoutingTrace(
        model=model,
        layers=tuple(layers),
        num_experts=experts,
        tokens=_array(arrays, "tokens", 1, np.int32, name),
        starts=_array(arrays, "starts", 1, np.uint8, name).astype(np.bool_),
        experts=_experts(arrays, "experts", name),
        samples=_samples(arrays, name) if "rows" in arrays else None,
    )


# --- files of arrays --------------------------------------------------------------------------------------------------


def pack(kind: str, version: str, facts: Mapping[str, Any], arrays: Arrays) -> bytes:
    """A file of `kind` with small `facts` and arrays."""
    metadata = {"format": kind, "version": version, "facts": json.dumps(facts, sort_keys=True)}
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
    return data


def unpack(data: bytes, kind: str, version: str, name: str, remedy: str = "") -> tuple[dict[str, Any], Arrays]:
    """What `pack` was given. Raises TraceError for anything else, and for another version, where `remedy` helps."""
    try:
        length = json_length(data[:PREFIX_SIZE], len(data))
        metadata = json.loads(data[PREFIX_SIZE : PREFIX_SIZE + length])["__metadata__"]
        found, facts = (metadata["format"], metadata["version"]), json.loads(metadata["facts"])
        arrays = load(data)
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError, CheckpointError) as error:
        raise TraceError(f"{name} is not a file that moehive wrote") from error
    if found[0] != kind or not isinstance(facts, dict):
        raise TraceError(f"{name} is no {kind} but {str(found[0])[:64]!r}")
    if found[1] != version:
        other = f"{name} has version {str(found[1])[:64]!r} of its format"
        raise TraceError(f"{other}; this build reads version {version}{remedy}")
    return facts, arrays


def read_bounded(path: Path) -> bytes:
    """A whole file of at most MAX_FILE_BYTES. Raises TraceError for a larger one or none, StorageError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise TraceError(f"{path} is larger than the {MAX_FILE_BYTES} bytes that are read")
    return data


def check_replaceable(path: Path) -> None:
    """Find out now what would keep `replace_file` from writing, where what is to be written takes long to make.

    Raises DestinationError for a name that no file can have, StorageError where the directory takes none.
    """
    if path.is_dir():
        raise DestinationError(f"cannot write {path}: it is a directory; name a file")
    if not path.parent.is_dir():
        raise DestinationError(f"cannot write {path}: there is no directory {path.parent}")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is never seen half-written. Raises StorageError."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _array(arrays: Arrays, name: str, dimensions: int, dtype: type[Any], file: str) -> NDArray[Any]:
    array = arrays.get(name)
    if array is None or array.ndim != dimensions or array.dtype != dtype:
        raise TraceError(f"{file}: {name} is missing or of another type")
    return array


def _experts(arrays: Arrays, name: str, file: str) -> NDArray[np.uint16]:
    array = arrays.get(name)
    if array is None or array.ndim != 3 or array.dtype not in (np.uint8, np.uint16):
        raise TraceError(f"{file}: {name} is missing or of another type")
    return array.astype(np.uint16)


def _samples(arrays: Arrays, file: str) -> HiddenSamples:
    return HiddenSamples(
        rows=_array(arrays, "rows", 1, np.int64, file),
        inputs=_array(arrays, "inputs", 3, np.float16, file),
        residuals=_array(arrays, "residuals", 3, np.float16, file),
    )
