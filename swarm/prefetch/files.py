"""Fitted predictors as files: the traces' container (swarm/trace/files.py) with other contents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from moehive.protocol.errors import TraceError
from moehive.swarm.trace.files import Arrays, pack, read_bounded, replace_file, unpack

from .attending import HEADS, MIXED, SIZE, WIDTH, Asker, Reader
from .fitting import Routers
from .history import PARTS, Floats
from .predictors import LinearMap, Point, Predictor

_FORMAT: Final = "moehive-predictor"
_VERSION: Final = "2"  # 1 had no network
_AGAIN: Final = "; fit again with moehive trace fit"

_READER: Final = "reader"
_ASKER: Final = {"query": "query", "queryOffset": "query_offset", "mix": "mix", "mixOffset": "mix_offset"}


def write_predictor(predictor: Predictor, routers: Routers, path: Path) -> None:
    """Write the predictor of the model with those routers; nobody sees half a file. Raises StorageError."""
    arrays: dict[str, Floats] = {}
    for (point, layer), found in predictor.maps.items():
        name = f"{point.name.lower()}.{layer}"
        arrays[f"{name}.weight"], arrays[f"{name}.offset"] = found.weight, found.offset
        if found.correction is not None:
            arrays[f"{name}.correction"] = found.correction
        if found.asker is not None:
            arrays |= {f"{name}.{part}": getattr(found.asker, field) for part, field in _ASKER.items()}
    for layer, reader in predictor.readers.items():
        arrays[f"{_READER}.{layer}.weight"], arrays[f"{_READER}.{layer}.sink"] = reader.weight, reader.sink
    facts = {"routers": fingerprint(routers), "topK": predictor.top_k, "hiddenSize": predictor.hidden_size}
    replace_file(path, pack(_FORMAT, _VERSION, facts, arrays))


def read_predictor(path: Path, routers: Routers) -> Predictor:
    """The predictor in that file, of the model with those routers.

    Raises TraceError for another model's, and for anything that `write_predictor` does not write; StorageError.
    """
    facts, arrays = unpack(read_bounded(path), _FORMAT, _VERSION, str(path), _AGAIN)
    if facts.get("routers") != fingerprint(routers):
        raise TraceError(f"{path} was fitted to another model")
    experts, hidden = next(iter(routers.values())).weight.shape
    top_k = facts.get("topK")
    if not isinstance(top_k, int) or not 0 < top_k <= experts or facts.get("hiddenSize") != hidden:
        raise TraceError(f"{path}: its numbers of experts and channels cannot be")
    maps, readers = {}, {}
    for name in arrays:
        if name.endswith(".weight"):
            kind, layer = _place(name, path)
            parts = _Parts(arrays, name.removesuffix(".weight"), path)
            if isinstance(kind, Point):
                maps[kind, layer] = _map(parts, hidden, experts)
            else:
                readers[layer] = Reader(parts.get("weight", hidden, 2 * WIDTH), parts.get("sink", HEADS, SIZE))
    if any(found.asker is not None and layer not in readers for (_, layer), found in maps.items()):
        raise TraceError(f"{path} is not complete: a layer has no reader")
    return Predictor(maps, top_k, hidden, readers)


def fingerprint(routers: Routers) -> str:
    """Names routers by their weights: a predictor for others guesses nonsense."""
    digest = hashlib.blake2b(digest_size=16)
    for layer, router in sorted(routers.items()):
        digest.update(f"{layer} {router.weight.shape}".encode())
        digest.update(np.ascontiguousarray(router.weight).tobytes())
    return digest.hexdigest()


def _place(name: str, path: Path) -> tuple[Point | None, int]:
    """The point and the layer of a map's weight; no point: a reader's."""
    point, _, layer = name.removesuffix(".weight").partition(".")
    if (point != _READER and point.upper() not in Point.__members__) or not layer.isdecimal():
        raise TraceError(f"{path} has an array {name[:64]!r}")
    return None if point == _READER else Point[point.upper()], int(layer)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The arrays of one map or reader."""

    arrays: Arrays
    name: str
    path: Path

    def has(self, part: str) -> bool:
        """Whether there is one of this name."""
        return f"{self.name}.{part}" in self.arrays

    def get(self, part: str, *shape: int) -> Floats:
        """The one of this name and shape. Raises TraceError."""
        found = self.arrays.get(f"{self.name}.{part}")
        if found is None:
            raise TraceError(f"{self.path}: {self.name} is not complete")
        if found.shape != shape or found.dtype != np.float32:
            raise TraceError(f"{self.path}: {self.name}.{part} has another shape or type than the model needs")
        return found


def _map(parts: _Parts, hidden: int, experts: int) -> LinearMap:
    asker = _asker(parts, hidden) if parts.has("query") else None
    rows = hidden + MIXED if asker is not None else hidden
    if asker is None and parts.arrays[f"{parts.name}.weight"].shape[:1] == ((1 + PARTS) * hidden,):
        rows = (1 + PARTS) * hidden
    correction = parts.get("correction", experts) if parts.has("correction") else None
    return LinearMap(parts.get("weight", rows, experts), parts.get("offset", experts), correction, asker)


def _asker(parts: _Parts, hidden: int) -> Asker:
    query, offset = parts.get("query", hidden, WIDTH), parts.get("queryOffset", WIDTH)
    return Asker(query, offset, parts.get("mix", WIDTH + hidden, MIXED), parts.get("mixOffset", MIXED))
