"""How the expert kernels are cut up: a function of the problem and the GPU. Overrides are in overrides.py.

Nothing is tuned when it runs. The table is what wins in the published tuning files for H100 and H200 (vLLM's
`fused_moe/configs`, SGLang's, triton_kernels' heuristics), by rows per active expert instead of by tokens, and within
what the compiled code of these kernels needs, which scripts/bench/aot_table.py shows for all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from moehive.kernels.formats import WeightFormat

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

    group: columns that share a scale; 0 where
    a scale belongs to a whole row, or there is none. element: bytes of one input that is multiplied.
    """

    columns: int
    inner: int
    format: WeightFormat
    group: int = 0
    gated: bool = False
    element: int = 2

    @property
    def plain(self) -> bool:
        """Whether weights are multiplied as they are stored: no decoding, and matrix instructions for the dtype."""
        return self.format is WeightFormat.PLAIN and self.element == 2

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


@lru_cache(maxsize=4096)
def choose(rows: int, experts: int, gate_up: Matrix, down: Matrix, device: Device) -> Configuration:
    """The configuration for `rows` choices that are spread over `experts` local experts."""
    active = max(active_experts(rows, experts), 1.0)
    block = block_rows(rows / active) if gate_up.element == 2 else 16  # no matrix instructions for fp32: small tiles
    blocks = active * max(1.0, rows / active / block)
    return Configuration(block, *(_tile(block, blocks, matrix, device) for matrix in (gate_up, down)))


def block_rows(rows_per_expert: float) -> int:
    """Rows of a block: twice what an expert has, so that few experts need a second block, from 16 to 128."""
    return min(max(_power_of_two(round(2 * rows_per_expert)), 16), 128)


def _tile(block: int, blocks: float, matrix: Matrix, device: Device) -> Tile:
    if block == 128:
        tile = _large(matrix, device)
    elif block == 64:
        tile = _medium(matrix, device)
    else:
        tile = _small(block, blocks, matrix, device)
    inner = _inner(tile.inner, matrix)
    columns = min(tile.columns, max(_power_of_two(matrix.columns), 16))
    tile = replace(tile, inner=inner, columns=columns)
    while shared_memory(tile, block, matrix, device) > device.shared_memory and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    while shared_memory(tile, block, matrix, device) > device.shared_memory:
        tile = replace(tile, columns=tile.columns // 2, warps=4)
    return tile if tile.persistent else replace(tile, split=_split(blocks, tile, matrix, device))


def _large(matrix: Matrix, device: Device) -> Tile:
    """128 rows: bound by arithmetic. Weights that are decoded get smaller tiles, and as many warps as let two programs
    run beside each other on sm_90: one decodes while the other multiplies.
    """
    halves = 2 if matrix.gated else 1
    if matrix.plain:
        return Tile(256 // halves, 64, warps=8, stages=3 if matrix.gated else 4, group=8, persistent=True)
    return Tile(128 // halves, 64, warps=8 if matrix.gated or not device.warpgroups else 4, stages=3, group=8)


def _medium(matrix: Matrix, device: Device) -> Tile:
    """64 rows: as many as warpgroup instructions take."""
    columns = 128 // (2 if matrix.gated else 1)
    if matrix.plain:
        return Tile(columns, 64, warps=4, stages=4, group=4)
    return Tile(columns, 64, warps=4 if device.warpgroups else 8, stages=3, group=4)


def _small(block: int, blocks: float, matrix: Matrix, device: Device) -> Tile:
    """16 or 32 rows: bound by memory. Wide rows of weights, several tiles in flight, and programs for every
    multiprocessor. Weights are the left side where that makes warpgroup instructions possible and nothing is decoded.
    """
    halves = 2 if matrix.gated else 1
    if matrix.element == 4:
        return Tile(64 // halves, 32, warps=4, stages=4)
    columns = 128 // halves
    if blocks * -(-matrix.columns // columns) < 2 * device.multiprocessors:
        columns //= 2
    swap = device.warpgroups and matrix.plain and block == 32
    return Tile(columns, 128, warps=4, stages=4 if block == 16 or matrix.plain else 3, swap=swap)


def _inner(wanted: int, matrix: Matrix) -> int:
    """A power of two from 32 on: one that fits the groups of scales, and divides the inner dimension if any does."""
    inner = wanted
    while inner > 32 and not fits_groups(inner, matrix):
        inner //= 2
    divisor = inner
    while divisor > 32 and matrix.inner % divisor:
        divisor //= 2
    return divisor if matrix.inner % divisor == 0 else min(inner, max(_power_of_two(matrix.inner), 32))


def fits_groups(inner: int, matrix: Matrix) -> bool:
    """Whether so many columns are a part of a group of scales, or, where the kernels can do that, several groups."""
    several = matrix.format in (WeightFormat.INT4_GROUP, WeightFormat.MXFP4)
    return not matrix.group or matrix.group % inner == 0 or (several and inner % matrix.group == 0)


def _split(blocks: float, tile: Tile, matrix: Matrix, device: Device) -> int:
    """Only where there are fewer programs than multiprocessors, and then with four tiles or more for each."""
    programs = blocks * -(-matrix.columns // tile.columns)
    split = 1
    while 2 * split * programs <= 2 * device.multiprocessors and matrix.inner // tile.inner >= 8 * split and split < 8:
        split *= 2
    return split if programs < device.multiprocessors else 1


def shared_memory(tile: Tile, block: int, matrix: Matrix, device: Device) -> int:
    """Bytes that a program needs at most: its stages, a tile of decoded weights, the result on its way out."""
    width = tile.columns * (2 if matrix.gated else 1)
    stage = block * tile.inner * matrix.element + width * tile.inner * matrix.weight_bits // 8
    decoded = 0 if matrix.format is WeightFormat.PLAIN else width * tile.inner * matrix.element
    warpgroups = device.warpgroups and max(block, width if tile.swap else 0) >= 64
    stages = tile.stages if warpgroups else tile.stages - 1
    return max(stages * stage + decoded, block * width * 4) + 2048


def _power_of_two(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


def check(configuration: Configuration, gate_up: Matrix, down: Matrix, device: Device) -> None:
    """Raise ValueError for what cannot run on `device`."""
    for tile, matrix in ((configuration.gate_up, gate_up), (configuration.down, down)):
        if not fits_groups(tile.inner, matrix):
            raise ValueError(f"tiles of {tile.inner} inner columns do not fit groups of {matrix.group}")
        if tile.persistent and tile.split > 1:
            raise ValueError("a persistent program does not split the inner dimension")
        needed = shared_memory(tile, configuration.block, matrix, device)
        if needed > device.shared_memory:
            raise ValueError(f"{tile} needs up to {needed} bytes of shared memory, of {device.shared_memory} there are")
