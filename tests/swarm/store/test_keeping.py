"""What is pinned or used by a live process is never evicted, by whichever process, whatever the clocks say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.ids import ModelId, ShardHash
from moehive.swarm.store.content import PARTIAL_MAX_AGE, ContentStore

NONE: frozenset[ModelId] = frozenset()
MODEL = ModelId("ab" * 32)
DATA = [Random(number).randbytes(100 + number) for number in range(3)]


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> ContentStore:
    return ContentStore(tmp_path / "store", 64 << 20, clock=clock)


@pytest.fixture
def hashes(store: ContentStore) -> list[ShardHash]:
    return [store.put(data) for data in DATA]


def another(store: ContentStore) -> ContentStore:
    """The store as another process sees it."""
    return ContentStore(store._layout.root, 64 << 20)


# --- uses -------------------------------------------------------------------------------------------------------------


def test_what_is_in_use_stays_until_the_use_ends(store: ContentStore, hashes: list[ShardHash]) -> None:
    with store.keeping.use(hashes[:2]):
        assert hashes[0] in store.keeping.now().in_use
        assert hashes[2] not in store.keeping.now().in_use
        assert another(store).evict(hashes, pins=NONE) == len(DATA[2])
        assert set(store.objects()) == set(hashes[:2])
    assert another(store).evict(hashes, pins=NONE) == len(DATA[0]) + len(DATA[1])
    assert list((store._layout.root / "uses").iterdir()) == []


def test_uses_add_up(store: ContentStore, hashes: list[ShardHash]) -> None:
    with store.keeping.use(hashes[:1]), another(store).keeping.use(hashes[:2]), store.keeping.use(()):
        assert store.keeping.now().in_use.objects == set(hashes[:2])
    assert store.keeping.now().in_use.objects == set()


_USER = """
import sys
from pathlib import Path
from moehive.swarm.store.content import ContentStore
store = ContentStore(Path(sys.argv[1]), 1 << 20)
with store.keeping.use([sys.argv[2]]):
    print("using", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def user(store: ContentStore, hashes: list[ShardHash]) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that uses the first object."""
    command = [sys.executable, "-c", _USER, str(store._layout.root), hashes[0]]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"using\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_uses_nothing(
    store: ContentStore, hashes: list[ShardHash], user: subprocess.Popen[bytes]
) -> None:
    assert store.evict(hashes[:1], pins=NONE) == 0
    os.kill(user.pid, signal.SIGKILL)
    user.wait()
    assert store.evict(hashes[:1], pins=NONE) == len(DATA[0])
    assert list((store._layout.root / "uses").iterdir()) == []


@pytest.mark.parametrize("jump", [-1e9, 1e9, 1e12])
def test_no_clock_ends_a_use(store: ContentStore, hashes: list[ShardHash], clock: Clock, jump: float) -> None:
    with store.keeping.use(hashes[:1]):
        clock.now += jump
        assert another(store).evict(hashes[:1], pins=NONE) == 0


@pytest.mark.parametrize("content", [b"", b"x" * 31])
def test_a_list_that_cannot_be_read_whole_means_everything(
    store: ContentStore, hashes: list[ShardHash], content: bytes
) -> None:
    with store.keeping.use(hashes[:1]):
        (file,) = (store._layout.root / "uses").iterdir()
        file.write_bytes(content)
        assert store.evict(hashes, pins=NONE) == 0


def test_who_deletes_the_lists_loses_protection_and_nothing_else(store: ContentStore, hashes: list[ShardHash]) -> None:
    with store.keeping.use(hashes[:1]):
        for file in (store._layout.root / "uses").iterdir():
            file.unlink()
        assert store.evict(hashes[:1], pins=NONE) == len(DATA[0])


# --- pins -------------------------------------------------------------------------------------------------------------


def test_pins_last_until_they_are_taken_back(store: ContentStore) -> None:
    store.keeping.pin(MODEL)
    store.keeping.pin(MODEL)
    assert another(store).keeping.now().pins == {MODEL}
    assert store.keeping.unpin(MODEL)
    assert not store.keeping.unpin(MODEL)
    assert another(store).keeping.now().pins == set()


def test_a_choice_made_before_a_pin_deletes_nothing(store: ContentStore, hashes: list[ShardHash]) -> None:
    before = store.keeping.now().pins
    another(store).keeping.pin(MODEL)
    assert store.evict(hashes, pins=before) == 0
    assert set(store.objects()) == set(hashes)


def test_strange_files_are_no_pins(store: ContentStore, hashes: list[ShardHash]) -> None:
    (store._layout.root / "pins" / "README").touch()
    assert store.keeping.now().pins == set()


# --- last use ---------------------------------------------------------------------------------------------------------


def test_use_is_remembered(store: ContentStore, hashes: list[ShardHash], clock: Clock) -> None:
    clock.now = 2e9
    with store.keeping.use(hashes[:1]):
        clock.now = 3e9
    assert store.keeping.last_used(hashes[0]) == 3e9
    assert another(store).keeping.last_used(hashes[1]) < 3e9
    assert store.keeping.last_used(ShardHash("0" * 64)) == 0.0


def test_a_use_in_the_future_counts_as_now(store: ContentStore, hashes: list[ShardHash], clock: Clock) -> None:
    clock.now = 9e9
    with store.keeping.use(hashes[:1]):
        pass
    clock.now = 1e9
    assert store.keeping.last_used(hashes[0]) == 1e9


# --- abandoned downloads ----------------------------------------------------------------------------------------------

BIG = Random(9).randbytes(2 * CHUNK_SIZE)
CHUNKS = ChunkList.of(BIG)


@pytest.fixture
def abandoned(store: ContentStore) -> ShardHash:
    with store.open_partial(CHUNKS.root, CHUNKS) as partial:
        partial.write_chunk(1, BIG[CHUNK_SIZE:])
    path = store._layout.partial(CHUNKS.root)
    os.utime(path, (1e9, 1e9))
    return CHUNKS.root


@pytest.mark.parametrize(("age", "gone"), [(PARTIAL_MAX_AGE - 1, False), (PARTIAL_MAX_AGE + 1, True), (-1e8, False)])
def test_a_download_waits_for_a_bounded_time(
    store: ContentStore, abandoned: ShardHash, clock: Clock, age: float, gone: bool
) -> None:
    clock.now = 1e9 + age
    assert store.sweep() == (len(BIG) if gone else 0)
    assert (abandoned not in store.partials()) == gone


def test_a_running_download_is_swept_at_no_age(store: ContentStore, clock: Clock) -> None:
    with store.open_partial(CHUNKS.root, CHUNKS) as partial:
        partial.write_chunk(0, BIG[:CHUNK_SIZE])
        clock.now = 1e12
        assert another(store).sweep() == store.sweep() == 0
        assert store.evict([CHUNKS.root], pins=NONE) == 0
        assert partial.missing() == (1,)


def test_an_abandoned_download_can_be_evicted(store: ContentStore, abandoned: ShardHash) -> None:
    assert store.evict([abandoned], pins=NONE) == len(BIG)
    assert store.usage().used_bytes == 0
