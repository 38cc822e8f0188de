"""Writing the chunks of a download past the page cache, where that is possible.

A chunk that is downloaded is rarely read again soon, and a copy of it in the page cache costs several times the
processor time of the write itself, and pushes out what is read often. So whole chunks go from the buffer to the disk
(O_DIRECT). What is not a whole number of blocks, and everything on file systems without such writes, is written as
usual. Either way nothing is durable before `fdatasync`.
"""

from __future__ import annotations

import mmap

from moehive.protocol.chunks import CHUNK_SIZE, Buffer

from .filesystem import FileSystem

BLOCK = 4096  # bytes; no disk asks for a coarser alignment of offset, length and address


def aligned_buffer(size: int) -> memoryview:
    """Fresh memory that can be written from without a copy: it begins on a page."""
    return memoryview(mmap.mmap(-1, size))


class ChunkWriter:
    """Writes to one file, one call at a time."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._spare: memoryview | None = None  # for chunks that begin anywhere
        self._direct = True  # False: refused once, not tried again

    def write(self, fd: int, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`. Raises OSError."""
        view = memoryview(data).cast("B")
        whole = 0 < len(view) <= CHUNK_SIZE and not len(view) % BLOCK and not offset % BLOCK
        if whole and self._direct:
            self._direct = self._write_direct(fd, view, offset)
            if self._direct:
                return
        self._fs.pwrite(fd, view, offset)
        self._fs.start_writing(fd, offset, len(view))

    def _write_direct(self, fd: int, view: memoryview, offset: int) -> bool:
        """Whether it worked; where not, a part of it may have been written."""
        if self._spare is None and self._fs.pwrite_direct(fd, view, offset):
            return True
        if self._spare is None:  # the buffer does not begin on a block, nor will those that follow
            self._spare = aligned_buffer(CHUNK_SIZE)
        copy = self._spare[: len(view)]
        copy[:] = view
        return self._fs.pwrite_direct(fd, copy, offset)
