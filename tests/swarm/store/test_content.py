"""The store on a real disk: what it takes, what it refuses, and how two users share it."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range
from moehive.protocol.errors import CorruptShard, DiskFull, StorageError
from moehive.protocol.ids import ShardHash
from moehive.swarm.store.base import DiskBudgetFull, NotHeld, PartialBusy, WrongBytes
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.filesystem import LocalFileSystem, storage_errors
from moehive.swarm.store.partial import PartialObject
from moehive.swarm.store.reading import VerifiedFiles, read_object, read_verified

DATA = Random(0).randbytes(2 * CHUNK_SIZE + 100)
CHUNKS = ChunkList.of(DATA)
HASH = CHUNKS.root
ABSENT = ShardHash("0" * 64)


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store", 8 * CHUNK_SIZE)


def chunk(index: int) -> bytes:
    offset, length = chunk_range(index, len(DATA))
    return DATA[offset : offset + length]


def finish(partial: PartialObject) -> Path:
    for index in partial.missing():
        partial.write_chunk(index, chunk(index))
    return partial.commit()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_chunks_in_any_order_become_the_object_and_nothing_is_visible_before(store: ContentStore) -> None:
    with store.open_partial(HASH, CHUNKS) as partial:
        assert partial.missing() == (0, 1, 2)
        for index in (2, 0):
            partial.write_chunk(index, chunk(index))
        assert (store.path(HASH), store.has(HASH), store.objects()) == (None, False, {})
        assert partial.missing() == (1,)
        with pytest.raises(StorageError, match="1 chunks are missing"):
            partial.commit()
        partial.write_chunk(1, chunk(1))
        path = partial.commit()
    assert path == store.path(HASH)
    assert path.read_bytes() == DATA
    assert store.objects() == {HASH: len(DATA)}
    assert store.partials() == {}
    assert store.chunk_list(HASH) == CHUNKS


def test_a_wrong_chunk_is_refused_before_it_is_written(store: ContentStore) -> None:
    with store.open_partial(HASH, CHUNKS) as partial:
        for wrong in (b"", chunk(0)[:-1], chunk(1), bytes(CHUNK_SIZE)):
            with pytest.raises(WrongBytes):
                partial.write_chunk(0, wrong)
        assert partial.missing() == (0, 1, 2)
        assert partial.read_chunk(0) is None


def test_a_chunk_list_of_another_object_is_refused(store: ContentStore) -> None:
    with pytest.raises(WrongBytes):
        store.open_partial(ABSENT, CHUNKS)
    huge = ChunkList(1 << 50, ())
    with pytest.raises(WrongBytes, match="at most"):
        store.open_partial(huge.root, huge)


def test_a_download_goes_on_where_it_stopped_with_what_is_still_right(store: ContentStore, tmp_path: Path) -> None:
    with store.open_partial(HASH, CHUNKS) as partial:
        for index in (0, 2):
            partial.write_chunk(index, chunk(index))
    flip(tmp_path / "store/partial" / f"{HASH}.part", 5)
    with store.open_partial(HASH, CHUNKS) as partial:
        assert partial.missing() == (0, 1)
        assert partial.read_chunk(2) == chunk(2)
        finish(partial)
        assert partial.read_chunk(0) == chunk(0), "a server may hold on to it"
        assert partial.missing() == ()
        assert partial.commit() == store.path(HASH)
    assert store.read(HASH) == DATA


def test_a_download_that_brought_nothing_and_one_that_is_discarded_leave_nothing(store: ContentStore) -> None:
    with store.open_partial(HASH, CHUNKS):
        assert store.usage().partial_bytes == len(DATA)
    assert store.usage().used_bytes == 0
    with store.open_partial(HASH, CHUNKS) as partial:
        partial.write_chunk(0, chunk(0))
        partial.discard()
        with pytest.raises(StorageError, match="closed"):
            partial.write_chunk(1, chunk(1))
    assert store.usage().used_bytes == 0
    assert not store.drop_partial(HASH)


def test_one_download_of_an_object_at_a_time_also_between_processes(store: ContentStore, tmp_path: Path) -> None:
    other = ContentStore(tmp_path / "store", 8 * CHUNK_SIZE)
    late = other.open_partial(HASH, CHUNKS)
    with store.open_partial(HASH, CHUNKS) as partial:
        for user in (store, other):
            with pytest.raises(PartialBusy), user.open_partial(HASH, CHUNKS):
                pass
        assert not other.drop_partial(HASH)
        assert other.usage().partial_bytes == len(DATA)
        finish(partial)
    with late:  # it finds the object finished
        assert late.missing() == ()
        late.write_chunk(0, chunk(0))
        assert late.read_chunk(1) == chunk(1)
        late.discard()
        assert late.commit() == store.path(HASH)
    assert other.objects() == {HASH: len(DATA)}


def test_the_budget_is_shared_and_refused_up_front_with_numbers(store: ContentStore, tmp_path: Path) -> None:
    other = ContentStore(tmp_path / "store", 3 * CHUNK_SIZE)
    assert other.usage().used_bytes == 0
    store.put(DATA)
    more = ChunkList.of(bytes(CHUNK_SIZE))
    with pytest.raises(DiskBudgetFull) as caught, other.open_partial(more.root, more):
        pass
    assert (caught.value.needed, caught.value.used, caught.value.budget) == (CHUNK_SIZE, len(DATA), 3 * CHUNK_SIZE)
    assert isinstance(caught.value, DiskFull)
    assert other.partials() == {}
    assert store.delete(HASH)
    with other.open_partial(more.root, more):
        assert other.usage().used_bytes == CHUNK_SIZE


def test_deleting_what_was_never_there(store: ContentStore) -> None:
    assert not store.delete(ABSENT)


def test_small_objects_go_in_and_out_whole(store: ContentStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    assert store.put(source, expected=HASH) == HASH == store.put(DATA)
    assert store.read(HASH) == DATA
    assert store.read(store.put(b"")) == b""
    with pytest.raises(WrongBytes):
        store.put(b"other", expected=HASH)
    with pytest.raises(StorageError, match="at most 10"):
        store.read(HASH, limit=10)
    with pytest.raises(NotHeld):
        store.read(ABSENT)


def test_ranges_are_verified_whether_or_not_they_lie_on_chunk_boundaries(store: ContentStore) -> None:
    store.put(DATA)
    end = len(DATA)
    for start, stop in [(0, 0), (0, 1), (5, CHUNK_SIZE + 5), (CHUNK_SIZE, end), (0, end), (end - 1, end), (end, end)]:
        assert store.read_range(HASH, start, stop - start) == DATA[start:stop]
    for offset, length in [(-1, 1), (0, -1), (0, end + 1), (end, 1)]:
        with pytest.raises(ValueError, match="of object"):
            store.read_range(HASH, offset, length)
    with pytest.raises(NotHeld):
        store.read_range(ABSENT, 0, 1)


WAYS_TO_NOTICE: dict[str, Callable[[ContentStore], object]] = {
    "range": lambda store: store.read_range(HASH, 2 * CHUNK_SIZE, 1),
    "chunk list": lambda store: store.chunk_list(HASH),
    "verify": lambda store: store.verify(HASH),
    "read": lambda store: store.read(HASH),
    "object": lambda store: read_object(store, HASH, len(DATA)),
    "truncated": lambda store: read_object(store, HASH, len(DATA)),
}


@pytest.mark.parametrize("how", WAYS_TO_NOTICE)
def test_a_rotten_object_is_never_given_out_and_repaired_by_its_bad_chunk_only(
    store: ContentStore, tmp_path: Path, how: str
) -> None:
    path = store.path(store.put(DATA))
    assert path is not None
    flip(path, 2 * CHUNK_SIZE)
    if how == "truncated":
        os.truncate(path, 2 * CHUNK_SIZE)
    fresh = ContentStore(tmp_path / "store", 8 * CHUNK_SIZE)  # with no chunk list in memory
    user = fresh if how == "chunk list" else store
    with pytest.raises(CorruptShard):
        WAYS_TO_NOTICE[how](user)
    assert fresh.path(HASH) is None
    assert list(store.partials()) == [HASH]
    with fresh.open_partial(HASH, CHUNKS) as partial:
        assert partial.missing() == (2,)
        finish(partial)
    assert store.read(HASH) == DATA


def test_what_cannot_be_moved_away_is_hidden_until_it_is_replaced(tmp_path: Path) -> None:
    class Stubborn(LocalFileSystem):
        refuses = False

        def rename(self, source: Path, target: Path) -> None:
            if self.refuses:
                raise OSError(errno.EROFS, "read-only")
            super().rename(source, target)

    fs = Stubborn()
    store = ContentStore(tmp_path, 8 * CHUNK_SIZE, fs=fs)
    path = store.path(store.put(DATA))
    assert path is not None
    flip(path, 0)
    fs.refuses = True
    with pytest.raises(CorruptShard) as caught:
        store.verify(HASH)
    assert "could not be moved away" in caught.value.__notes__[0]
    assert store.path(HASH) is None
    assert store.objects() == {}
    fs.refuses = False
    store.put(DATA)
    assert store.read(HASH) == DATA


def test_names_from_peers_are_no_paths(store: ContentStore) -> None:
    store.put(b"x")
    for name in ("../lock", "", "0" * 63, "A" * 64, f"../partial/{ABSENT}"):
        assert store.path(ShardHash(name)) is None
        assert not store.delete(ShardHash(name))


def test_sweeping_keeps_what_can_be_resumed_and_what_is_not_ours(store: ContentStore, tmp_path: Path) -> None:
    with store.open_partial(HASH, CHUNKS) as partial:
        partial.write_chunk(0, chunk(0))
    finished = store.put(b"finished")
    partials = tmp_path / "store/partial"
    (partials / f"{finished}.part").write_bytes(b"left over")
    (partials / f"{ABSENT}.part").touch()
    (partials / "notes.txt").touch()
    fresh = ContentStore(tmp_path / "store", 8 * CHUNK_SIZE)
    assert fresh.sweep() == len(b"left over")
    assert {path.name for path in partials.iterdir()} == {f"{HASH}.part", "notes.txt"}
    assert fresh.drop_partial(HASH)
    assert fresh.usage().partial_bytes == 0


def test_many_threads_write_one_object(store: ContentStore) -> None:
    with store.open_partial(HASH, CHUNKS) as partial, ThreadPoolExecutor(4) as pool:
        start = threading.Barrier(4)

        def write(seed: int) -> None:
            start.wait(10)
            for index in Random(seed).sample(range(3), 3):
                partial.write_chunk(index, chunk(index))

        for done in [pool.submit(write, seed) for seed in range(4)]:
            done.result(10)
        partial.commit()
    assert store.read(HASH) == DATA


def test_read_verified_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    buffer = read_verified(path, len(DATA), HASH)
    assert buffer == DATA
    buffer[0] ^= 1  # it is the caller's own
    with pytest.raises(CorruptShard, match="bytes"):
        read_verified(path, len(DATA) - 1, HASH)
    with pytest.raises(CorruptShard, match="hash"):
        read_verified(path, len(DATA), ABSENT)
    with pytest.raises(StorageError, match="No such file"):
        read_verified(tmp_path / "nothing", len(DATA), HASH)
    with pytest.raises(NotHeld):
        read_object(ContentStore(tmp_path, 0), HASH, 1)


def test_the_cache_of_chunk_lists_is_bounded(tmp_path: Path) -> None:
    read: list[str] = []

    class Counting(LocalFileSystem):
        def open_read(self, path: Path) -> int:
            read.append(path.name)
            return super().open_read(path)

    objects = [Random(i).randbytes(CHUNK_SIZE + 1) for i in range(3)]
    hashes = [ChunkList.of(data).root for data in objects]
    for name, data in zip(hashes, objects, strict=True):
        (tmp_path / name).write_bytes(data)
    files = VerifiedFiles(lambda name: tmp_path / name, lambda _: None, fs=Counting(), max_hashes=4)
    for which in (0, 1, 0, 2, 0, 1):
        files.chunk_list(hashes[which])
    assert read == [hashes[which] for which in (0, 1, 2, 1)]


def test_errors_of_the_operating_system_are_translated() -> None:
    for code, kind in [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, StorageError)]:
        with pytest.raises(kind, match="cannot write /x"), storage_errors("write", Path("/x")):
            raise OSError(code, "reason")
