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
from .writing import Block, Part


class SourceFiles:
    """Open files of a source directory; reads at any offset from any thread. Use as a context manager."""

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


def blocks(planned: PlannedFile, source: SourceFiles, buffer: memoryview) -> Iterator[Block]:
    """The file's bytes in order, a full buffer at a time; a block is valid until the next one is asked for."""
    parts: list[Part] = []
    filled = 0
    for content in _contents(planned, source):
        taken, size = 0, content.size if isinstance(content, Span) else len(content)
        while taken < size:
            step = min(size - taken, len(buffer) - filled)
            out = buffer[filled : filled + step]
            if isinstance(content, Span):
                parts.append(source.read_part(content.file, content.offset + taken, out))
            else:
                out[:] = content[taken : taken + step]
                parts.append(Part(out))
            taken, filled = taken + step, filled + step
            if filled == len(buffer):
                yield Block(buffer, parts)
                parts, filled = [], 0
    if parts:
        yield Block(buffer[:filled], parts)


def _contents(planned: PlannedFile, source: SourceFiles) -> Iterator[memoryview | Span]:
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


def _version(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
