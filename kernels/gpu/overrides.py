"""Configurations from a file, where somebody measured better ones than configuration.py chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from moehive.kernels.formats import WeightFormat

from .configuration import Configuration, Device, Matrix, Tile, check

_CONDITIONS: Final = {
    "sm": int,
    "format": str,
    "hidden": int,
    "intermediate": int,
    "rows_from": float,
    "rows_to": float,
}
_USE: Final = {"block": int, "gate_up": dict, "down": dict}
_TILE: Final = {field.name: bool if field.type == "bool" else int for field in fields(Tile)}
_RANGES: Final = {"block": (16, 128), "columns": (16, 256), "inner": (32, 256), "warps": (1, 8), "group": (1, 64),
                  "split": (1, 16)}  # fmt: skip
_MAX_STAGES: Final = 8


@dataclass(frozen=True, slots=True)
class Override:
    """Fields of `Configuration` that replace the chosen ones where all conditions hold; a None holds everywhere.

    rows_from, rows_to: rows per active expert, both included. format is that of gate_up.
    """

    use: Mapping[str, Any]
    sm: int | None = None
    format: str | None = None
    hidden: int | None = None
    intermediate: int | None = None
    rows_from: float | None = None
    rows_to: float | None = None

    def holds(self, rows_per_expert: float, gate_up: Matrix, device: Device) -> bool:
        """Whether this is for that problem."""
        wanted = (self.sm, self.format, self.hidden, self.intermediate)
        found = (device.sm, gate_up.format.value, gate_up.inner, gate_up.columns)
        if any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
            return False
        return (self.rows_from or 0.0) <= rows_per_expert <= (float("inf") if self.rows_to is None else self.rows_to)


def load_overrides(path: Path) -> tuple[Override, ...]:
    """Read a JSON list of objects with `use` and any of the conditions.

        [{"sm": 90, "format": "plain", "rows_to": 16, "use": {"block": 16, "gate_up": {"columns": 64, "stages": 5}}}]

    `use` may have block, and under gate_up and down any field of `Tile`. Raises ValueError, naming the entry, for
    anything unknown, out of range or of the wrong type, and OSError where the file cannot be read.
    """
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: not a JSON list of overrides")
    return tuple(_override(f"{path}, entry {number}", entry) for number, entry in enumerate(entries))


def _override(where: str, entry: Any) -> Override:
    _check_fields(where, entry, {"use": dict, **_CONDITIONS})
    if "use" not in entry:
        raise ValueError(f"{where}: 'use' is missing")
    names = [known.value for known in WeightFormat]
    if entry.get("format", names[0]) not in names:
        raise ValueError(f"{where}: unknown format {entry['format']!r}, not one of {names}")
    _check_fields(f"{where}, use", entry["use"], _USE)
    for projection in ("gate_up", "down"):
        _check_fields(f"{where}, {projection}", entry["use"].get(projection, {}), _TILE)
    return Override(**entry)


def _check_fields(where: str, entry: Any, known: Mapping[str, type]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: not an object")
    for name, value in entry.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name!r}, not one of {sorted(known)}")
        kind = (int, float) if known[name] is float else known[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and known[name] is not bool):
            raise ValueError(f"{where}: {name} is {value!r}, not of type {known[name].__name__}")
        _check_range(where, name, entry[name])


def _check_range(where: str, name: str, value: Any) -> None:
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high or value & (value - 1):
            raise ValueError(f"{where}: {name} is {value}, not a power of two from {low} to {high}")
    if name == "stages" and not 1 <= value <= _MAX_STAGES:
        raise ValueError(f"{where}: stages is {value}, not from 1 to {_MAX_STAGES}")


def apply_overrides(
    overrides: Sequence[Override],
    chosen: Configuration,
    rows_per_expert: float,
    gate_up: Matrix,
    down: Matrix,
    device: Device,
) -> Configuration:
    """`chosen` with what the first override that holds replaces. Raises ValueError for what cannot run on `device`."""
    override = next((o for o in overrides if o.holds(rows_per_expert, gate_up, device)), None)
    if override is None:
        return chosen
    configuration = Configuration(
        override.use.get("block", chosen.block),
        replace(chosen.gate_up, **override.use.get("gate_up", {})),
        replace(chosen.down, **override.use.get("down", {})),
    )
    check(configuration, gate_up, down, device)
    return configuration
