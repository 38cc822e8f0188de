"""Processes that are killed at any moment leave a store that is right, and nothing that stays locked or in use."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, object_root
from moehive.swarm.store.content import ContentStore

BUDGET = 12 * CHUNK_SIZE
KILLS = 12
OBJECTS = [random.Random(number).randbytes(number * CHUNK_SIZE // 2 + 1) for number in range(6)]

# Downloads, evicts, pins and uses for as long as it lives. Its first argument is the store.
_WORKER = """
import random, sys
from pathlib import Path
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range
from moehive.protocol.errors import StorageError
from moehive.swarm.store.content import ContentStore

store = ContentStore(Path(sys.argv[1]), int(sys.argv[2]))
objects = [random.Random(number).randbytes(number * CHUNK_SIZE // 2 + 1) for number in range(6)]
lists = [ChunkList.of(data) for data in objects]
names = [chunks.root for chunks in lists]
dice = random.Random()
print("at work", flush=True)
while True:
    which = dice.randrange(len(objects))
    try:
        store.sweep()
        with store.keeping.use([names[which]]):
            with store.open_partial(names[which], lists[which]) as partial:
                for index in partial.missing():
                    offset, length = chunk_range(index, len(objects[which]))
                    partial.write_chunk(index, objects[which][offset : offset + length])
                partial.commit()
            assert store.has(names[which]), "evicted in use"
        store.keeping.pin(names[dice.randrange(len(objects))])
        store.keeping.unpin(names[dice.randrange(len(objects))])
        store.evict(dice.sample(names, 3), pins=store.keeping.now().pins)
    except StorageError:
        pass
"""


@pytest.mark.slow
def test_two_processes_killed_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "store"
    command = [sys.executable, "-c", _WORKER, str(root), str(BUDGET)]
    for kill in range(KILLS):
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"at work\n"
            time.sleep(random.Random(kill).uniform(0.0, 0.3))  # the moment is the point
        finally:
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            errors = [worker.communicate()[1] for worker in workers]
        assert errors == [b"", b""]
        store = ContentStore(root, BUDGET)
        names = {object_root(data) for data in OBJECTS}
        for path in (root / "objects").glob("*/*"):
            assert object_root(path.read_bytes()) == path.name
            assert path.name in names
        assert store.usage().used_bytes <= BUDGET
        assert store.keeping.now().in_use.objects == set()
        assert list((root / "uses").iterdir()) == []
    store.sweep()
    for pinned in store.keeping.now().pins:
        store.keeping.unpin(pinned)
    for data in OBJECTS:  # nothing is in the way of going on
        store.evict(store.objects(), pins=frozenset())
        assert store.put(data) == ChunkList.of(data).root
