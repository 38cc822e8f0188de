"""Fitted predictors as files: the traces' container (swarm/trace/files.py) with other contents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from moehive.protocol.errors import TraceError
from moehive.swarm.trace.files import Arrays, pack, read_bounded, replace_file, unpack

from .fitting import Router
from .history import PARTS, Floats
from .predictors import LinearMap, Point, Predictor

_FORMAT: Final = "moehive-predictor"
_VERSION: Final = "1"


def write_predictor(predictor: Predictor, routers: Mapping[int, Router], path: Path) -> None:
    """Write the predictor of the model with those routers; nobody sees half a file. Raises StorageError."""
    arrays: dict[str, Floats] = {}
    for (point, layer), found in predictor.maps.items():
        name = f"{point.name.lower()}.{layer}"
        arrays[f"{name}.weight"], arrays[f"{name}.offset"] = found.weight, found.offset
        if found.correction is not None:
            arrays[f"{name}.correction"] = found.correction
    facts = {"routers": fingerprint(routers), "topK": predictor.top_k, "hiddenSize": predictor.hidden_size}
    replace_file(path, pack(_FORMAT, _VERSION, facts, arrays))


def read_predictor(path: Path, routers: Mapping[int, Router]) -> Predictor:
    """The predictor in that file, of the model with those routers.

    Raises TraceError for another model's, and for anything that `write_predictor` does not write; StorageError.
    """
    facts, arrays = unpack(read_bounded(path), _FORMAT, _VERSION, str(path))
    if facts.get("routers") != fingerprint(routers):
        raise TraceError(f"{path} was fitted to another model")
    experts, hidden = next(iter(routers.values())).weight.shape
    top_k = facts.get("topK")
    if not isinstance(top_k, int) or not 0 < top_k <= experts or facts.get("hiddenSize") != hidden:
        raise TraceError(f"{path}: its numbers of experts and channels cannot be")
    maps = {}
    for name in arrays:
        if name.endswith(".weight"):
            maps[_place(name, path)] = _map(arrays, name.removesuffix(".weight"), hidden, experts, path)
    return Predictor(maps, top_k, hidden)


def fingerprint(routers: Mapping[int, Router]) -> str:
    """Names routers by their weights: a predictor for others guesses nonsense."""
    digest = hashlib.blake2b(digest_size=16)
    for layer, router in sorted(routers.items()):
        digest.update(f"{layer} {router.weight.shape}".encode())
        digest.update(np.ascontiguousarray(router.weight).tobytes())
    return digest.hexdigest()


def _place(name: str, path: Path) -> tuple[Point, int]:
    point, _, layer = name.removesuffix(".weight").partition(".")
    if point.upper() not in Point.__members__ or not layer.isdecimal():
        raise TraceError(f"{path} has an array {name[:64]!r}")
    return Point[point.upper()], int(layer)


def _map(arrays: Arrays, name: str, hidden: int, experts: int, path: Path) -> LinearMap:
    weight, offset, correction = (arrays.get(f"{name}.{part}") for part in ("weight", "offset", "correction"))
    if weight is None or offset is None:
        raise TraceError(f"{path}: {name} is not complete")
    vectors = [offset] if correction is None else [offset, correction]
    right = weight.shape in ((hidden, experts), ((1 + PARTS) * hidden, experts))
    if not right or any(vector.shape != (experts,) for vector in vectors):
        raise TraceError(f"{path}: {name} has another shape than {experts} experts and {hidden} channels need")
    if any(array.dtype != np.float32 for array in (weight, *vectors)):
        raise TraceError(f"{path}: {name} has another type than float32")
    return LinearMap(weight, offset, correction)
