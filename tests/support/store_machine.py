"""A stateful Hypothesis machine over the store: two processes on one store, on a file system that fails and crashes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.faulty_filesystem import FaultyFileSystem, Killed, PowerCut

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_range, object_root
from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import ExpertFfn, Gate, Manifest, ModelFacts, ShardEntry, ShardType
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.partial import PartialObject
from moehive.swarm.store.reading import read_object

HOME = Path("/home")
ROOT = HOME / "a" / "store"  # the store has to make two levels
OBJECTS = [Random(i).randbytes(size) for i, size in enumerate([0, 5, CHUNK_SIZE + 7, 2 * CHUNK_SIZE])]


def _manifest() -> Manifest:
    """A model of two experts, objects 1 and 2, and an asset, object 0. Object 3 is nobody's."""
    facts = ModelFacts(
        name="tiny", model_type="mixtral", architecture="MixtralForCausalLM", dtype="BF16", hidden_size=1,
        intermediate_size=1, num_experts=2, top_k=1, moe_layers=(0,), ffn=ExpertFfn(Gate.CONCATENATED, "silu"),
    )  # fmt: skip
    hashes = [ChunkList.of(data).root for data in OBJECTS]
    experts = tuple(
        ShardEntry(f"experts/{i}", ShardType.EXPERT, len(OBJECTS[i + 1]), hashes[i + 1], ExpertKey(0, i))
        for i in (0, 1)
    )
    return Manifest(facts, (ShardEntry("config.json", ShardType.ASSET, 0, hashes[0]), *experts), {})


MANIFEST = _manifest()
OBJECTS.append(MANIFEST.to_bytes())
LISTS = [ChunkList.of(data) for data in OBJECTS]
HASHES = [chunks.root for chunks in LISTS]
CONTENT = {chunks.root: data for chunks, data in zip(LISTS, OBJECTS, strict=True)}
BUDGET = sum(map(len, OBJECTS))


def make_store(fs: FaultyFileSystem) -> ContentStore:
    return ContentStore(ROOT, BUDGET, fs=fs, clock=lambda: fs.now)


def chunk_of(which: int, index: int) -> bytes:
    offset, length = chunk_range(index, len(OBJECTS[which]))
    return OBJECTS[which][offset : offset + length]


def fill(partial: PartialObject, which: int) -> None:
    for index in reversed(partial.missing()):
        partial.write_chunk(index, chunk_of(which, index))


def download(store: ContentStore, which: int) -> None:
    with store.open_partial(LISTS[which].root, LISTS[which]) as partial:
        fill(partial, which)
        partial.commit()


def visible(fs: FaultyFileSystem) -> dict[str, bytes]:
    return {path.name: data for path, data in fs.files(ROOT / "objects").items()}


def check_nothing_wrong_visible(fs: FaultyFileSystem) -> None:
    for name, data in visible(fs).items():
        assert object_root(data) == name


WHICH = st.integers(0, len(OBJECTS) - 1)


@dataclass
class _Download:
    partial: PartialObject
    holds_lock: bool  # False: it was finished already when it was opened


class StoreUnderFire(RuleBasedStateMachine):
    """Two processes on one store: downloads, reads, deletions, bit rot, faults, kills and power cuts in any order."""

    @initialize(seed=st.integers(0, 1 << 30), filled=st.booleans(), direct=st.booleans())
    def boot(self, seed: int, filled: bool, direct: bool) -> None:
        self.fs = FaultyFileSystem(HOME, seed=seed)
        self.fs.direct = direct
        self.durable: set[ShardHash] = set()  # committed, and not deleted since
        self.rotten: set[ShardHash] = set()  # a bit was flipped in a final file, which a power cut may bring back
        self.start_processes()
        for which in range(len(OBJECTS) * filled):
            self.put(0, which)

    def start_processes(self) -> None:
        """Two that have just begun."""
        self.stores = [make_store(self.fs), make_store(self.fs)]
        self.partials: dict[int, _Download] = {}

    def _reboot(self, *, power_cut: bool) -> None:
        self.fs = self.fs.after_power_cut() if power_cut else self.fs.after_kill()
        self.start_processes()
        held = set(visible(self.fs))
        assert self.durable - self.rotten <= held, "committed, and lost"

    def attempt(self, action: Callable[[], object], *, uncertain: int | None = None) -> bool:
        """Run; True where it succeeded. After a failure nobody knows whether `uncertain` is durable."""
        try:
            action()
        except (PowerCut, Killed) as crash:
            if uncertain is not None:
                self.durable.discard(LISTS[uncertain].root)
            self._reboot(power_cut=isinstance(crash, PowerCut))
            return False
        except StorageError:
            if uncertain is not None:
                self.durable.discard(LISTS[uncertain].root)
            return False
        return True

    @rule(process=st.integers(0, 1), which=WHICH)
    def open(self, process: int, which: int) -> None:
        if which not in self.partials:
            finished = LISTS[which].root in visible(self.fs)
            partial = self.stores[process].open_partial(LISTS[which].root, LISTS[which])
            if self.attempt(partial.__enter__):
                self.partials[which] = _Download(partial, holds_lock=not finished)

    @precondition(lambda self: any(download.holds_lock for download in self.partials.values()))
    @rule(process=st.integers(0, 1), data=st.data())
    def open_what_is_being_downloaded(self, process: int, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(sorted(i for i, download in self.partials.items() if download.holds_lock)))
        second = self.stores[process].open_partial(LISTS[which].root, LISTS[which])
        assert not self.attempt(second.__enter__), "two processes write one file"

    @precondition(lambda self: self.partials)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(sorted(self.partials)))
        missing = self.partials[which].partial.missing()
        if missing:
            index = data.draw(st.sampled_from(missing))
            self.attempt(lambda: self.partials[which].partial.write_chunk(index, chunk_of(which, index)))

    @precondition(lambda self: self.partials)
    @rule(data=st.data())
    def serve_partial(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(sorted(self.partials)))
        index = data.draw(st.integers(0, max(0, len(LISTS[which].hashes) - 1)))
        if LISTS[which].hashes:
            found: list[bytes | None] = []
            self.attempt(lambda: found.append(self.partials[which].partial.read_chunk(index)))
            assert found in ([], [None], [chunk_of(which, index)])

    @precondition(lambda self: self.partials)
    @rule(data=st.data(), complete=st.booleans())
    def finish(self, data: st.DataObject, complete: bool) -> None:
        which = data.draw(st.sampled_from(sorted(self.partials)))
        partial = self.partials.pop(which).partial

        def run() -> None:
            try:
                if complete:
                    fill(partial, which)
                    partial.commit()
            finally:
                partial.__exit__(None, None, None)

        if self.attempt(run, uncertain=which) and complete and LISTS[which].root in visible(self.fs):
            self.durable.add(LISTS[which].root)

    @rule(process=st.integers(0, 1), which=WHICH)
    def put(self, process: int, which: int) -> None:
        """A whole download, so that there usually is something to lose."""
        if which not in self.partials and self.attempt(lambda: download(self.stores[process], which), uncertain=which):
            self.durable.add(HASHES[which])

    @rule(process=st.integers(0, 1), which=WHICH)
    def delete(self, process: int, which: int) -> None:
        self.durable.discard(LISTS[which].root)
        self.attempt(lambda: self.stores[process].delete(LISTS[which].root))

    @rule(process=st.integers(0, 1), which=WHICH)
    def read(self, process: int, which: int) -> None:
        root, store, found = LISTS[which].root, self.stores[process], []
        if self.attempt(lambda: found.append(read_object(store, root, len(OBJECTS[which]), fs=self.fs))):
            assert found == [OBJECTS[which]]
        self.attempt(lambda: found.append(store.read_range(root, 0, min(3, len(OBJECTS[which])))))
        assert all(data == OBJECTS[which][: len(data)] for data in found)

    @rule(process=st.integers(0, 1))
    def sweep(self, process: int) -> None:
        self.attempt(self.stores[process].sweep)

    @precondition(lambda self: visible(self.fs))
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        files = {path: content for path, content in self.fs.files(ROOT / "objects").items() if content}
        if files:
            path = data.draw(st.sampled_from(sorted(files)))
            self.fs.corrupt(path, data.draw(st.integers(0, len(files[path]) - 1)))
            self.rotten.add(ShardHash(path.name))

    @rule(after=st.integers(0, 12), code=st.sampled_from([errno.ENOSPC, errno.EIO]))
    def break_soon(self, after: int, code: int) -> None:
        self.fs.heal()  # one fault at a time: the store survives each, not every pair
        self.fs.fail_at(self.fs.steps + after, code)

    @rule(after=st.integers(0, 12))
    def cut_soon(self, after: int) -> None:
        self.fs.cut_power_at(self.fs.steps + after)

    @rule(after=st.integers(0, 12))
    def kill_soon(self, after: int) -> None:
        self.fs.kill_at(self.fs.steps + after)

    @rule(power_cut=st.booleans())
    def crash(self, power_cut: bool) -> None:
        self._reboot(power_cut=power_cut)

    @invariant()
    def nothing_unverified_is_visible(self) -> None:
        for name, data in visible(self.fs).items():
            if name not in self.rotten:
                assert data == CONTENT[ShardHash(name)]

    @invariant()
    def the_budget_holds(self) -> None:
        held = {**self.fs.files(ROOT / "objects"), **self.fs.files(ROOT / "partial")}
        assert sum(map(len, held.values())) <= BUDGET

    def teardown(self) -> None:
        """Whatever happened: a fresh start can finish every download, and then all bytes are exact."""
        self.fs = self.fs.after_kill()
        store = make_store(self.fs)
        store.sweep()
        for root in list(store.objects()):
            try:
                store.verify(root)
            except CorruptShard:
                assert root in self.rotten
        for which in range(len(OBJECTS)):
            download(store, which)
        assert visible(self.fs) == CONTENT
        assert visible(self.fs.after_power_cut()) == CONTENT
