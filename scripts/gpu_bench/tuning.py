"""Configurations near the chosen one, for --tune: what is faster is written as a file of overrides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from moehive.kernels.gpu.configuration import Configuration, Device, Matrix, Tile, check


def neighbours(chosen: Configuration, gate_up: Matrix, down: Matrix, device: Device) -> Iterator[Configuration]:
    """The chosen configuration with one thing changed, as far as it can run."""
    candidates = [replace(chosen, gate_up=tile) for tile in _tiles(chosen.gate_up, device)]
    candidates += [replace(chosen, down=tile) for tile in _tiles(chosen.down, device)]
    candidates += [
        replace(chosen, block=block) for block in (chosen.block // 2, chosen.block * 2) if 16 <= block <= 128
    ]
    for candidate in candidates:
        try:
            check(candidate, gate_up, down, device)
        except ValueError:
            continue
        yield candidate


def _tiles(tile: Tile, device: Device) -> Iterator[Tile]:
    yield from (replace(tile, stages=tile.stages + step) for step in (-1, 1) if tile.stages + step >= 2)
    yield from (replace(tile, columns=columns) for columns in (tile.columns // 2, tile.columns * 2) if columns >= 16)
    yield from (replace(tile, inner=inner) for inner in (tile.inner // 2, tile.inner * 2) if inner >= 32)
    yield replace(tile, warps=12 - tile.warps)  # 4 and 8
    yield replace(tile, persistent=not tile.persistent, split=1)
    if device.warpgroups:
        yield replace(tile, swap=not tile.swap)
    if not tile.persistent:
        yield replace(tile, split=2 * tile.split)


def as_override(found: Configuration, rows_per_expert: float, gate_up: Matrix, device: Device) -> dict[str, Any]:
    """For a file that `load_overrides` reads: around that many rows per expert, these shapes, this architecture."""
    use = {"block": found.block, "gate_up": asdict(found.gate_up), "down": asdict(found.down)}
    return {
        "sm": device.sm, "format": gate_up.format.value, "hidden": gate_up.inner, "intermediate": gate_up.columns,
        "rows_from": rows_per_expert / 2, "rows_to": rows_per_expert * 2, "use": use,
    }  # fmt: skip
