"""Chunks past the page cache: on a real disk, from any address, and where the file system has no such writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from support.faulty_filesystem import FaultyFileSystem
from support.store_machine import HOME, LISTS, OBJECTS, download, make_store, visible

from moehive.protocol.chunks import CHUNK_SIZE, Buffer
from moehive.swarm.store.filesystem import LOCAL, LocalFileSystem
from moehive.swarm.store.writing import BLOCK, ChunkWriter, aligned_buffer

DATA = Random(1).randbytes(CHUNK_SIZE)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = LOCAL.open_write(tmp_path / "file")
    LOCAL.allocate(fd, 3 * CHUNK_SIZE)
    yield fd
    LOCAL.close(fd)


def aligned(data: bytes) -> memoryview:
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    return buffer


def is_direct(fd: int) -> bool:
    """Whether the disk takes direct writes at all; a tmpfs need not."""
    return LOCAL.pwrite_direct(fd, aligned(bytes(BLOCK)), 0)


@pytest.mark.parametrize("length", [CHUNK_SIZE, CHUNK_SIZE - BLOCK, BLOCK, 1, 511, CHUNK_SIZE - 1])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_length_from_any_address_can_be_read_at_once(fd: int, length: int, shift: int) -> None:
    """What is read was in the page cache before: the writes are not hidden by what it had."""
    assert LOCAL.pread(fd, 3 * CHUNK_SIZE, 0) == bytes(3 * CHUNK_SIZE)
    writer, memory = ChunkWriter(LOCAL), aligned(DATA + bytes(BLOCK))
    view = memory[shift : shift + length]
    for index in (1, 0):
        writer.write(fd, view, index * CHUNK_SIZE)
    whole = bytes(view) + bytes(CHUNK_SIZE - length)
    assert LOCAL.pread(fd, 3 * CHUNK_SIZE, 0) == whole + whole + bytes(CHUNK_SIZE)


def test_direct_writes_leave_nothing_in_the_page_cache_and_the_descriptor_as_it_was(fd: int) -> None:
    if not is_direct(fd):
        pytest.skip("this disk takes no direct writes")

    class Recorder(LocalFileSystem):
        buffered = 0

        def pwrite(self, fd: int, data: Buffer, offset: int) -> None:
            self.buffered += len(data)
            super().pwrite(fd, data, offset)

    fs = Recorder()
    writer = ChunkWriter(fs)
    writer.write(fd, b"the end", 2 * CHUNK_SIZE)
    assert fs.buffered == 7
    writer.write(fd, aligned(DATA), 0)
    writer.write(fd, DATA, CHUNK_SIZE)
    assert fs.buffered == 7
    for index in range(2):
        with pytest.raises(BlockingIOError):  # it is not in memory
            os.preadv(fd, [bytearray(BLOCK)], index * CHUNK_SIZE, os.RWF_NOWAIT)
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    assert LOCAL.pread(fd, 2 * CHUNK_SIZE + 7, 0) == DATA + DATA + b"the end"


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_system_without_direct_writes_is_asked_once(direct: bool) -> None:
    """What a refused one has written of its chunk is written over."""
    fs = FaultyFileSystem(HOME)
    fs.direct = direct
    store = make_store(fs)
    download(store, 3)
    assert visible(fs.after_power_cut()) == {LISTS[3].root: OBJECTS[3]}
    direct_calls = [call for call in fs.log if call.startswith("pwrite_direct")]
    assert len(direct_calls) == 2, "both chunks at once, or one from each address"
