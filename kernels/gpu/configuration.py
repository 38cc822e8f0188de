"""How the expert kernels are cut up: a function of the problem and the GPU, with optional overrides from a file.

Nothing is tuned when it runs. The table is what wins in the published tuning files for H100 and H200 (vLLM's
`fused_moe/configs`, SGLang's, triton_kernels' heuristics), by rows per active expert instead of by tokens, and within
what the compiled code of these kernels needs: tests/kernels/gpu/test_aot_experts.py compiles every line of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from moehive.kernels.formats import WeightFormat

_4_BIT: Final = (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
_BITS: Final = {WeightFormat.FP8_BLOCK: 8, WeightFormat.INT8_CHANNEL: 8, WeightFormat.INT4_GROUP: 4,
                WeightFormat.MXFP4: 4}  # fmt: skip

# Bytes of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"); unknown ones have the least.
_SHARED: Final[Mapping[int, int]] = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10,
                                     100: 227 << 10, 103: 227 << 10, 120: 99 << 10}  # fmt: skip
_SHARED_LEAST: Final = 99 << 10


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU: compute capability as major * 10 + minor, and its streaming multiprocessors."""

    sm: int
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may have."""
        return _SHARED.get(self.sm, _SHARED_LEAST)

    @property
    def warpgroups(self) -> bool:
        """Whether there are warpgroup matrix instructions (sm_90 alone), which take 64 rows at least."""
        return self.sm == 90


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection: `columns` outputs of `inner` inputs; a gated one has two rows of weights for each output.

    group: columns of the matrix that share a scale, 0 for none. element: bytes of one input that is multiplied.
    """

    columns: int
    inner: int
    format: WeightFormat
    group: int = 0
    gated: bool = False
    element: int = 2

    @property
    def weight_bits(self) -> int:
        """Bits of one stored weight."""
        return _BITS.get(self.format, 8 * self.element)


@dataclass(frozen=True, slots=True)
class Tile:
    """How one projection is cut. Powers of two, but for `stages`.

    columns, inner: of one tile, BN and BK. group: blocks of rows that use a column of weights before the next is read.
    split: parts of the inner dimension that different programs add. swap: weights as the left side of the product.
    persistent: one program for each multiprocessor computes tile after tile.
    """

    columns: int
    inner: int
    warps: int = 4
    stages: int = 3
    group: int = 1
    split: int = 1
    swap: bool = False
    persistent: bool = False


@dataclass(frozen=True, slots=True)
class Configuration:
    """Both projections of a layer; they share the blocks of rows."""

    block: int
    gate_up: Tile
    down: Tile


def active_experts(rows: int, experts: int) -> float:
    """How many of `experts` at least one of `rows` independent choices is expected to hit."""
    return experts * (1.0 - (1.0 - 1.0 / experts) ** rows) if rows else 0.0


def choose(rows: int, experts: int, gate_up: Matrix, down: Matrix, device: Device) -> Configuration:
    """The configuration for `rows` choices spread over `experts` local experts."""
    active = max(active_experts(rows, experts), 1.0)
    block = block_rows(rows / active)
    blocks = active * max(1.0, rows / active / block)
    return Configuration(block, *(_tile(block, blocks, matrix, device) for matrix in (gate_up, down)))


def block_rows(rows_per_expert: float) -> int:
    """Rows of a block: twice what an expert has, so that few experts need a second block, from 16 to 128."""
    return min(max(_power_of_two(2 * rows_per_expert), 16), 128)


def _tile(block: int, blocks: float, matrix: Matrix, device: Device) -> Tile:
    tile = _large(matrix) if block == 128 else _small(block, blocks, matrix, device)
    inner = _inner(tile.inner, matrix)
    columns = min(tile.columns, max(_power_of_two(matrix.columns), 16))
    tile = replace(tile, inner=inner, columns=columns)
    while shared_memory(tile, block, matrix, device) > device.shared_memory and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    while shared_memory(tile, block, matrix, device) > device.shared_memory:
        tile = replace(tile, columns=tile.columns // 2, warps=4)
    return tile if tile.persistent else replace(tile, split=_split(blocks, tile, matrix, device))


def _large(matrix: Matrix) -> Tile:
    """128 rows: bound by arithmetic. Weights that need decoding are better served by two smaller tiles beside each other:
    one decodes while the other multiplies."""
    halves = 2 if matrix.gated else 1
    if matrix.format is WeightFormat.PLAIN and matrix.element == 2:
        return Tile(256 // halves, 64, warps=8, stages=4 if not matrix.gated else 3, group=8, persistent=True)
    return Tile(128 // halves, 128, warps=8, stages=3, group=8)


def _small(block: int, blocks: float, matrix: Matrix, device: Device) -> Tile:
    """Bound by memory: wide rows of weights, several tiles in flight, and programs for all multiprocessors."""
    halves = 2 if matrix.gated else 1
    wide = 128 // halves
    if block < 64 and blocks * -(-matrix.columns // wide) < 2 * device.multiprocessors:
        wide //= 2
    bits = matrix.weight_bits
    inner = 128 if block < 64 or bits < 16 else 64
    swap = device.warpgroups and matrix.format is WeightFormat.PLAIN and matrix.element == 2 and block == 32
    return Tile(wide, inner, warps=4, stages=4 if block == 16 or bits >= 16 else 3, swap=swap)


def _inner(wanted: int, matrix: Matrix) -> int:
    """A power of two that divides the inner dimension if one from 32 on does, and fits the groups of scales."""
    inner = wanted
    while inner > 32 and matrix.inner % inner:
        inner //= 2
    if matrix.inner % inner:
        inner = min(wanted, max(_power_of_two(matrix.inner), 32))
    if matrix.format in _4_BIT and matrix.group < inner and not _is_power_of_two(matrix.group):
        inner = matrix.group & -matrix.group
    while matrix.group and matrix.format is not WeightFormat.INT8_CHANNEL and matrix.group % inner:
        if matrix.format in _4_BIT and inner % matrix.group == 0:
            break
        inner //= 2
    return inner


def _split(blocks: float, tile: Tile, matrix: Matrix, device: Device) -> int:
    """Only where there are fewer programs than multiprocessors, and then with four tiles or more for each."""
    programs = blocks * -(-matrix.columns // tile.columns)
    split = 1
    while 2 * split * programs <= 2 * device.multiprocessors and matrix.inner // tile.inner >= 8 * split and split < 8:
        split *= 2
    return split if programs < device.multiprocessors else 1


def shared_memory(tile: Tile, block: int, matrix: Matrix, device: Device) -> int:
    """Bytes that a program needs at most: its stages, a decoded tile where weights are decoded, the result on its way."""
    width = tile.columns * (2 if matrix.gated else 1)
    stage = block * tile.inner * matrix.element + width * tile.inner * matrix.weight_bits // 8
    decoded = 0 if matrix.format is WeightFormat.PLAIN else width * tile.inner * matrix.element
    warpgroups = device.warpgroups and max(block, width if tile.swap else 0) >= 64
    stages = tile.stages if warpgroups else tile.stages - 1
    return max(stages * stage + decoded, block * width * 4) + 2048


def _power_of_two(value: float) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(int(-(-value // 1)) - 1, 0).bit_length()


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


# --- overrides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Override:
    """Fields of `Configuration` that replace the chosen ones where all conditions hold; a None holds everywhere.

    rows_from, rows_to: rows per active expert, both included. hidden, inner, format: of the gate_up projection.
    """

    use: Mapping[str, Any]
    sm: int | None = None
    format: str | None = None
    hidden: int | None = None
    inner: int | None = None
    rows_from: float | None = None
    rows_to: float | None = None

    def holds(self, rows_per_expert: float, gate_up: Matrix, device: Device) -> bool:
        """Whether this is for that problem."""
        wanted = (self.sm, self.format, self.hidden, self.inner)
        found = (device.sm, gate_up.format.value, gate_up.inner, gate_up.columns)
        if any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
            return False
        return (self.rows_from or 0.0) <= rows_per_expert <= (self.rows_to or float("inf"))


def load_overrides(path: Path) -> tuple[Override, ...]:
    """Read a file of overrides: a JSON list of objects with `use` and any of the conditions.

        [{"sm": 90, "format": "plain", "rows_to": 16, "use": {"block": 16, "gate_up": {"columns": 64, "stages": 5}}}]

    `use` may have block, and under gate_up and down any field of `Tile`. Raises ValueError, naming the entry, for
    anything unknown or of the wrong type, and OSError where the file cannot be read.
    """
    entries = json.loads(path.read_text())
    if not isinstance(entries, list):
        raise ValueError(f"{path}: not a JSON list of overrides")
    return tuple(_override(f"{path}, entry {number}", entry) for number, entry in enumerate(entries))


def _override(where: str, entry: Any) -> Override:
    conditions = {"sm": int, "format": str, "hidden": int, "inner": int, "rows_from": float, "rows_to": float}
    _check_fields(where, entry, {"use": dict, **conditions})
    if "use" not in entry:
        raise ValueError(f"{where}: 'use' is missing")
    if entry.get("format") not in (None, *(format.value for format in WeightFormat)):
        raise ValueError(f"{where}: unknown format {entry['format']!r}")
    _check_fields(f"{where}, use", entry["use"], {"block": int, "gate_up": dict, "down": dict})
    kinds = {field.name: bool if field.type == "bool" else int for field in fields(Tile)}
    for projection in ("gate_up", "down"):
        tile = entry["use"].get(projection, {})
        _check_fields(f"{where}, {projection}", tile, kinds)
        _check_values(f"{where}, {projection}", tile)
    _check_values(where, {name: entry["use"][name] for name in ("block",) if name in entry["use"]})
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


_RANGES: Final = {"block": (16, 128), "columns": (16, 256), "inner": (32, 256), "warps": (1, 8), "stages": (1, 8),
                  "group": (1, 64), "split": (1, 16)}  # fmt: skip


def _check_values(where: str, entry: Mapping[str, Any]) -> None:
    for name, value in entry.items():
        low, high = _RANGES.get(name, (0, 1))
        if not low <= value <= high or (name != "stages" and name in _RANGES and not _is_power_of_two(value)):
            raise ValueError(f"{where}: {name} is {value!r}, not a power of two from {low} to {high}")


def apply(
    overrides: tuple[Override, ...],
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
    tiles = {
        name: replace(getattr(chosen, name), **override.use.get(name, {})) for name in ("gate_up", "down")
    }  # fmt: skip
    configuration = Configuration(override.use.get("block", chosen.block), **tiles)
    for name, matrix in (("gate_up", gate_up), ("down", down)):
        check(tiles[name], configuration.block, matrix, device)
    return configuration


def check(tile: Tile, block: int, matrix: Matrix, device: Device) -> None:
    """Raise ValueError for a tile that cannot run."""
    if _inner(tile.inner, replace(matrix, inner=tile.inner)) != tile.inner:
        raise ValueError(f"tiles of {tile.inner} inner columns do not fit groups of {matrix.group}")
    if (needed := shared_memory(tile, block, matrix, device)) > device.shared_memory:
        raise ValueError(
            f"{tile} needs up to {needed} bytes of shared memory, sm_{device.sm} has {device.shared_memory}"
        )
    if tile.persistent and tile.split > 1:
        raise ValueError("a persistent program does not split the inner dimension")
