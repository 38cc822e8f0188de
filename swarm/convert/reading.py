"""The bytes of one planned file, block by block, into a buffer of the caller. Each byte of the source is read once.

Memory: the caller's buffer, one file head, and for an fp8 weight of the skeleton one band of rows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from moehive.protocol.errors import CheckpointError

from .layout import BlockScale, Piece, PlannedFile, Span


class SourceFiles:
    """Open files of a source directory; reads at any offset from any thread. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

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

    def read(self, span: Span) -> bytearray:
        """A small span as bytes."""
        out = bytearray(span.size)
        self.read_into(span.file, span.offset, memoryview(out))
        return out

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._directory / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


def blocks(planned: PlannedFile, source: SourceFiles, buffer: memoryview) -> Iterator[memoryview]:
    """The file's bytes in order. Every block but the last fills `buffer`; it is valid until the next is asked for."""
    filled = 0
    for part in _parts(planned, source):
        taken, size = 0, part.size if isinstance(part, Span) else len(part)
        while taken < size:
            step = min(size - taken, len(buffer) - filled)
            out = buffer[filled : filled + step]
            if isinstance(part, Span):
                source.read_into(part.file, part.offset + taken, out)
            else:
                out[:] = part[taken : taken + step]
            taken, filled = taken + step, filled + step
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _parts(planned: PlannedFile, source: SourceFiles) -> Iterator[memoryview | Span]:
    yield memoryview(planned.head())
    if planned.original:
        yield planned.original
    for piece in planned.pieces:
        if piece.scale is None:
            yield piece.span
        else:
            yield from _dequantized(piece, piece.scale, source)


def _dequantized(piece: Piece, scale: BlockScale, source: SourceFiles) -> Iterator[memoryview]:
    """An fp8 matrix as bf16 bytes, one band of rows under the same row of scales after the other."""
    from .fp8 import dequantize_band  # torch: only a checkpoint with fp8 weights in its skeleton pays for it

    rows, columns = piece.spec.shape
    height, width = scale.block
    scales = source.read(scale.span)
    row_bytes = len(scales) // -(-rows // height)
    for band, start in enumerate(range(0, rows, height)):
        count = min(height, rows - start)
        weight = source.read(Span(piece.span.file, piece.span.offset + start * columns, count * columns))
        yield dequantize_band(weight, scales[band * row_bytes : (band + 1) * row_bytes], columns=columns, width=width)
