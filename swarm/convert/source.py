"""A Hugging Face checkpoint directory as facts: its config, and where every tensor lies. Reads headers, never weights.

Only files that `model.safetensors.index.json` names are looked at (a repository may hold other copies of the same
weights), or `model.safetensors` where there is no index. Nothing in the directory is ever executed. The safetensors
files may lie elsewhere than the small ones: they are read through a SourceReader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import MANIFEST_NAME
from moehive.protocol.safetensors_header import PREFIX_SIZE, TensorSpan, json_length, parse_header

from .reading import SourceFiles, SourceReader

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_FIRST_READ = 128 << 10  # bytes: the header of most files of a large checkpoint, in one request where it is far away
_READERS = 8


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the source; `span.offset` counts from the start of `file`."""

    file: str
    span: TensorSpan


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]


def read_checkpoint(directory: Path, files: SourceReader | None = None) -> Checkpoint:
    """Read config, index and headers. Raises CheckpointError where anything is missing, truncated or contradictory.

    `files` reads the safetensors files where they do not lie in `directory`.
    """
    if files is None:
        with SourceFiles(directory) as own:
            return read_checkpoint(directory, own)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a model of the hub is downloaded first: hf download")
    if (directory / MANIFEST_NAME).exists():
        raise CheckpointError(f"{directory} is a converted directory already; use it as it is")
    config = read_object(directory / CONFIG_NAME)
    index = directory / INDEX_NAME
    tensors = _indexed(directory, index, files) if index.exists() else _headers(directory, files, SINGLE_NAME)
    return Checkpoint(directory, config, tensors)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: not a Hugging Face checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def _indexed(directory: Path, index: Path, reader: SourceReader) -> dict[str, SourceTensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    files = [_plain_name(file) for file in sorted(set(weight_map.values()), key=str)]
    if (directory / SINGLE_NAME).exists() and SINGLE_NAME not in files:
        raise CheckpointError(f"{directory} has both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is not meant")
    found: dict[str, SourceTensor] = {}
    with ThreadPoolExecutor(_READERS, thread_name_prefix="headers") as pool:
        for file, tensors in zip(files, pool.map(partial(_headers, directory, reader), files), strict=True):
            for name, tensor in tensors.items():
                if weight_map.get(name, file) == file:  # a copy that the index points away from is not the tensor
                    found[name] = tensor
    missing = sorted(set(weight_map) - set(found))
    if missing:
        raise CheckpointError(f"{INDEX_NAME} names {missing[0]}, but {weight_map[missing[0]]} does not hold it")
    return found


def _plain_name(file: Any) -> str:
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX_NAME} names the file {file!r}; a safetensors file of the directory is expected")
    return file


def _headers(directory: Path, files: SourceReader, file: str) -> dict[str, SourceTensor]:
    path = directory / file
    try:
        head, size = files.head(file, _FIRST_READ)
        end = PREFIX_SIZE + json_length(head, size)
        if end > len(head):
            head, _ = files.head(file, end)
        spans = parse_header(head[PREFIX_SIZE:end], size)
    except FileNotFoundError as error:
        hint = " (moehive reads safetensors only)" if any(directory.glob("*.bin")) else ""
        raise CheckpointError(f"{path} is missing{hint}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {name: SourceTensor(file, span) for name, span in spans.items()}
