"""The bytes of one planned file, block by block or any range of them, into a buffer of the caller.

Block by block each byte of the source is read once. Memory: the caller's buffer, one file head, for an fp8 weight of
the skeleton one band of rows, and for a 4-bit weight of the skeleton one band and, twice, all of it as it is stored.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from moehive.protocol.errors import CheckpointError

from .layout import BlockScale, PackedWeight, Piece, PlannedFile, Span
from .writing import Block, Part

if TYPE_CHECKING:
    from moehive.kernels.formats import WeightMatrix

_PACKED_BAND = 1 << 19  # values of a 4-bit weight widened at a time


class SourceReader(Protocol):
    """The files of a checkpoint, wherever they are; reads at any offset from any thread."""

    def head(self, file: str, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file, fewer where it is shorter, and its size.

        Raises FileNotFoundError where there is no such file, CheckpointError where it cannot be read.
        """

    def read_part(self, file: str, offset: int, out: memoryview) -> Part:
        """Fill `out` from `offset` on. Raises CheckpointError where the file ends first or cannot be read."""

    def read(self, span: Span) -> bytearray:
        """A small span as bytes. Raises CheckpointError."""

    def close(self) -> None:
        """Close what is open; whatever is read afterwards is opened again."""


class SourceFiles:
    """A SourceReader over a directory. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See SourceReader."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def head(self, file: str, count: int) -> tuple[bytes, int]:
        """See SourceReader."""
        try:
            descriptor = self._open(file)
            return os.pread(descriptor, count, 0), os.fstat(descriptor).st_size
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self._directory / file} cannot be read: {error}") from error

    def read_into(self, file: str, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on. Raises CheckpointError where the file ends first or cannot be read."""
        try:
            descriptor = self._open(file)
            filled = 0
            while filled < len(out):
                count = os.preadv(descriptor, [out[filled:]], offset + filled)
                if count == 0:
                    raise CheckpointError(
                        f"{self._directory / file} ends at byte {offset + filled}: it was cut while it was read"
                    )
                filled += count
        except OSError as error:
            raise CheckpointError(f"{self._directory / file} cannot be read: {error}") from error

    def read_part(self, file: str, offset: int, out: memoryview) -> Part:
        """`read_into`, remembering where the bytes came from."""
        self.read_into(file, offset, out)
        return Part(out, self._open(file), offset)

    def read(self, span: Span) -> bytearray:
        """A small span as bytes."""
        out = bytearray(span.size)
        self.read_into(span.file, span.offset, memoryview(out))
        return out

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file was written to since it was opened."""
        for file, descriptor in self._descriptors.items():
            if _version(descriptor) != self._versions[file]:
                raise CheckpointError(f"{self._directory / file} changed during the conversion; run it again")

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = os.open(self._directory / file, os.O_RDONLY | os.O_CLOEXEC)
                self._descriptors[file] = descriptor
                self._versions[file] = _version(descriptor)
            return self._descriptors[file]


def blocks(planned: PlannedFile, source: SourceReader, buffer: memoryview) -> Iterator[Block]:
    """The file's bytes in order, a full buffer at a time; a block is valid until the next one is asked for."""
    parts: list[Part] = []
    filled = 0
    for content in _contents(planned):
        taken, data = 0, content if isinstance(content, Span) else _bytes_of(content, source)
        size = data.size if isinstance(data, Span) else len(data)
        while taken < size:
            step = min(size - taken, len(buffer) - filled)
            out = buffer[filled : filled + step]
            if isinstance(data, Span):
                parts.append(source.read_part(data.file, data.offset + taken, out))
            else:
                out[:] = data[taken : taken + step]
                parts.append(Part(out))
            taken, filled = taken + step, filled + step
            if filled == len(buffer):
                yield Block(buffer, parts)
                parts, filled = [], 0
    if parts:
        yield Block(buffer[:filled], parts)


def read_range(planned: PlannedFile, source: SourceReader, offset: int, out: memoryview) -> None:
    """Fill `out` with the file's bytes from `offset` on; it must not reach beyond the file. Raises CheckpointError."""
    position, end = 0, offset + len(out)
    for content in _contents(planned):
        first, last = max(position, offset), min(position + _size(content), end)
        if first < last:
            target, skipped = out[first - offset : last - offset], first - position
            if isinstance(content, Span):
                source.read_part(content.file, content.offset + skipped, target)
            else:
                target[:] = _bytes_of(content, source)[skipped : skipped + len(target)]
        position += _size(content)
    assert position >= end, (planned.file, position, end)


class _Scales:
    """The scales of one fp8 matrix, read when first needed."""

    def __init__(self, scale: BlockScale) -> None:
        self._scale = scale
        self._bytes: bytearray | None = None

    def row(self, index: int, rows: int, source: SourceReader) -> bytearray:
        """The scales of one band of rows, of `rows` bands."""
        if self._bytes is None:
            self._bytes = source.read(self._scale.span)
        length = len(self._bytes) // rows
        return self._bytes[index * length : (index + 1) * length]


@dataclass(frozen=True)
class _Band:
    """The rows of an fp8 matrix that share one row of scales: bf16 once they are read."""

    piece: Piece
    block: tuple[int, int]  # rows, columns that share one scale
    scales: _Scales
    index: int

    @cached_property
    def rows(self) -> int:
        """The last band may be cut."""
        return min(self.block[0], self.piece.spec.shape[0] - self.index * self.block[0])

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.piece.spec.shape[1] * 2

    def read(self, source: SourceReader) -> memoryview:
        """The bf16 bytes."""
        from .fp8 import dequantize_band  # torch: only a checkpoint with fp8 weights in its skeleton pays for it

        rows, columns = self.piece.spec.shape
        (height, width), span = self.block, self.piece.span
        weight = source.read(Span(span.file, span.offset + self.index * height * columns, self.rows * columns))
        scales = self.scales.row(self.index, -(-rows // height), source)
        return dequantize_band(weight, scales, columns=columns, width=width)


class _Packed:
    """A 4-bit weight, read when first needed."""

    def __init__(self, name: str, weight: PackedWeight) -> None:
        self._name = name
        self._weight = weight
        self._matrix: WeightMatrix | None = None

    def matrix(self, source: SourceReader) -> WeightMatrix:
        """With rows as outputs. Raises CheckpointError for tensors that do not fit each other."""
        from .int4 import packed_matrix  # as with fp8

        if self._matrix is None:
            parts = [(spec, source.read(span)) for spec, span in self._weight.parts]
            self._matrix = packed_matrix(self._name, self._weight.quantization, parts)
        return self._matrix


@dataclass(frozen=True)
class _PackedBand:
    """Some rows of a 4-bit weight: floating point once they are read."""

    piece: Piece
    packed: _Packed
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        spec = self.piece.spec
        return spec.size // spec.shape[0] * (self.stop - self.start)

    def read(self, source: SourceReader) -> memoryview:
        """The bytes in the piece's dtype."""
        from .int4 import widened_rows

        return widened_rows(self.packed.matrix(source), self.piece.spec, self.start, self.stop)


_Content = memoryview | Span | _Band | _PackedBand


def _contents(planned: PlannedFile) -> Iterator[_Content]:
    """What the file consists of, from front to back. Reads nothing."""
    yield memoryview(planned.head())
    if planned.original:
        yield planned.original
    for piece in planned.pieces:
        match piece.widening:
            case None:
                yield piece.span
            case BlockScale(block=block) as scale:
                scales, rows = _Scales(scale), piece.spec.shape[0]
                yield from (_Band(piece, block, scales, index) for index in range(-(-rows // block[0])))
            case PackedWeight() as weight:
                yield from _packed_bands(piece, weight)


def _packed_bands(piece: Piece, weight: PackedWeight) -> Iterator[_PackedBand]:
    (rows, columns), packed = piece.spec.shape, _Packed(piece.spec.name, weight)
    step = max(_PACKED_BAND // columns, 1)
    return (_PackedBand(piece, packed, start, min(start + step, rows)) for start in range(0, rows, step))


def _size(content: _Content) -> int:
    return len(content) if isinstance(content, memoryview) else content.size


def _bytes_of(content: memoryview | _Band | _PackedBand, source: SourceReader) -> memoryview:
    return content if isinstance(content, memoryview) else content.read(source)


def _version(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
