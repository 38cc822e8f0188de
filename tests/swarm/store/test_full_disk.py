"""A disk that is really full, at every step: a tmpfs that grows by a page, or by a file, until everything fits."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range, object_root
from moehive.protocol.errors import DiskFull
from moehive.protocol.ids import ModelId
from moehive.swarm.store.content import ContentStore

PAGE = os.sysconf("SC_PAGE_SIZE")
OBJECTS = [Random(number).randbytes(size) for number, size in enumerate((100, PAGE + 1, CHUNK_SIZE + PAGE))]
LISTS = [ChunkList.of(data) for data in OBJECTS]
MODEL = ModelId("ab" * 32)
BUDGET = 64 << 20
ENOUGH = "size=8m,nr_inodes=1000"


class SmallDisk:
    """A tmpfs whose limits can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def limit(self, limits: str) -> None:
        _mount("-o", f"remount,{limits}", str(self.path))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", ENOUGH, "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a tmpfs can only be mounted by root")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def live(store: ContentStore) -> None:
    """What a process does: downloads, a pin, a use, an eviction."""
    store.sweep()
    store.keeping.pin(MODEL)
    with store.keeping.use([chunks.root for chunks in LISTS]):
        for data, chunks in zip(OBJECTS, LISTS, strict=True):
            with store.open_partial(chunks.root, chunks) as partial:
                for index in partial.missing():
                    offset, length = chunk_range(index, len(data))
                    partial.write_chunk(index, data[offset : offset + length])
                partial.commit()
    store.evict([LISTS[0].root], pins=frozenset({MODEL}))


def check_nothing_wrong_is_visible(store: ContentStore) -> None:
    for path in (store.root / "objects").glob("*/*"):
        assert object_root(path.read_bytes()) == path.name


def in_pages() -> Iterator[str]:
    """Every page up to the small objects, then in larger steps through the large one, then every page again."""
    size = PAGE
    while True:
        yield f"size={size}"
        size += PAGE if size < 16 * PAGE or size > CHUNK_SIZE else 16 * PAGE


def in_files() -> Iterator[str]:
    """Every name that has to be made: the root takes the first one."""
    return (f"nr_inodes={count}" for count in itertools.count(1))


@pytest.mark.parametrize(("limits", "least"), [(in_pages(), 2), (in_files(), 5)], ids=["pages", "files"])
def test_a_disk_that_is_full_at_every_step(disk: SmallDisk, limits: Iterator[str], least: int) -> None:
    """Whatever does not fit is said; nothing wrong appears; with more room the same process goes on."""
    said: set[str] = set()
    for number, limit in enumerate(limits):
        root = disk.path / f"store{number}"
        store = ContentStore(root, BUDGET)
        disk.limit(limit)
        try:
            live(store)
        except DiskFull as error:
            said.add(str(error).replace(str(root), ""))
        else:
            break
        check_nothing_wrong_is_visible(store)
        disk.limit(ENOUGH)
        live(store)
        assert set(store.objects()) == {LISTS[1].root, LISTS[2].root}
        check_nothing_wrong_is_visible(store)
        shutil.rmtree(root)
    assert len(said) >= least, "it was always the same step that found no room"


def test_a_node_can_start_on_a_full_disk_and_protects_what_it_has(disk: SmallDisk) -> None:
    store = ContentStore(disk.path / "store", BUDGET)
    live(store)
    (disk.path / "filler").write_bytes(bytes(os.statvfs(disk.path).f_bavail * PAGE))
    with store.keeping.use([LISTS[1].root]):
        assert store.keeping.now().in_use.everything, "its list could not be written"
        assert store.evict([LISTS[1].root, LISTS[2].root], pins=frozenset({MODEL})) == 0
        assert store.read(LISTS[1].root) == OBJECTS[1]
    assert store.evict([LISTS[2].root], pins=frozenset({MODEL})) == len(OBJECTS[2])
