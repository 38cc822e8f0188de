"""The file without a name."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.errors import DiskFull, StorageError
from moehive.swarm.model.kv import scratch
from moehive.swarm.model.kv.scratch import ScratchFile


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to let a file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nobody_else_sees_what_is_in_it(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "a" / "kv")
    file.write(memoryview(b"secret"), 0)
    assert stat.S_IMODE((tmp_path / "a" / "kv").stat().st_mode) == 0o700
    assert list((tmp_path / "a" / "kv").iterdir()) == []  # so a process that is killed leaves nothing


def test_what_was_written_is_read_into_its_parts(tmp_path: Path) -> None:
    file, parts = ScratchFile(tmp_path), [bytearray(size) for size in (1, 0, 3, 2)]
    file.write(memoryview(b"..abcdef"), 0)
    file.write(memoryview(b"AB"), 2)
    file.read_into([memoryview(part) for part in parts], 2)
    assert parts == [b"A", b"", b"Bcd", b"ef"]


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 3), st.integers(1, 4))
def test_short_reads_and_many_parts(sizes: list[int], most: int, vectors: int) -> None:
    file, parts = ScratchFile(Path(tempfile.gettempdir())), [bytearray(size) for size in sizes]
    content = bytes(range(sum(sizes)))
    file.write(memoryview(content), 0)

    def stingy(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert len(buffers) <= vectors
        buffer = next((buffer for buffer in buffers if buffer), memoryview(bytearray()))[:most]
        return os.preadv(fd, [buffer], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "_VECTORS", vectors)
        patch.setattr(scratch, "os", _Os(stingy))
        file.read_into([memoryview(part) for part in parts], 0)
    assert b"".join(parts) == content


class _Os:
    """The module `os` with another preadv."""

    def __init__(self, preadv: object) -> None:
        self.preadv = preadv

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def test_a_cut_file_ends_there(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    file.write(memoryview(b"abcdef"), 0)
    file.truncate(4)
    with pytest.raises(StorageError, match="shorter than what was written"):
        file.read_into([memoryview(bytearray(5))], 0)


def test_a_full_disk_has_its_own_error(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    with files_up_to(4), pytest.raises(DiskFull, match=str(tmp_path)):
        file.write(memoryview(b"abcdef"), 0)
    file.write(memoryview(b"abcdef"), 0)


def test_it_lies_where_it_was_asked_for(tmp_path: Path) -> None:
    """Elsewhere may be memory (tmpfs), which bounds nothing."""
    file = ScratchFile(tmp_path / "kv")
    assert Path(f"/proc/self/fd/{file._fd}").readlink().parent == tmp_path / "kv"


@pytest.mark.parametrize("what", ["write", "read", "cut"])
def test_a_disk_that_is_gone_is_an_error_of_storage(tmp_path: Path, what: str) -> None:
    file = ScratchFile(tmp_path)
    file.write(memoryview(b"abcdef"), 0)
    assert file._fd is not None
    os.close(file._fd)
    act = {
        "write": lambda: file.write(memoryview(b"a"), 0),
        "read": lambda: file.read_into([memoryview(bytearray(2))], 0),
        "cut": lambda: file.truncate(1),
    }[what]
    with pytest.raises(StorageError, match=f"{what} a KV cache file in"):
        act()
    file._fd = None  # the number may be another file's by now


def test_a_directory_that_cannot_be_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="make a KV cache file"):
        ScratchFile(tmp_path / "file" / "kv")


@pytest.mark.parametrize("how", ["close", "collect"])
def test_its_space_is_given_back(tmp_path: Path, how: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    file = ScratchFile(tmp_path)
    assert set(os.listdir("/proc/self/fd")) - before
    if how == "close":
        file.close()
        file.close()
    del file
    assert set(os.listdir("/proc/self/fd")) <= before
