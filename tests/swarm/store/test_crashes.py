"""The store's promises under power cuts, kills, failing calls and full disks at every step."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.faulty_filesystem import FaultyFileSystem, Killed, PowerCut
from support.store_machine import (
    BUDGET,
    CONTENT,
    HASHES,
    HOME,
    LISTS,
    MANIFEST,
    OBJECTS,
    ROOT,
    StoreUnderFire,
    check_nothing_wrong_visible,
    chunk_of,
    download,
    fill,
    make_store,
    visible,
)

from moehive.node.holdings import Holdings
from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.errors import DiskFull, StorageError
from moehive.protocol.ids import ShardHash
from moehive.swarm.policy.eviction import Rank
from moehive.swarm.store.catalogue import Cataloguer
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.pruning import PruneRequest, plan_prune

# --- every step, exhaustively -----------------------------------------------------------------------------------------


# What one process does from the first call: two objects, one of them small, a deletion, a pin, a use with a repeated
# download in it, and an eviction of what is in use and of what is not there.
def life(store: ContentStore) -> None:
    store.sweep()
    download(store, 2)
    store.put(OBJECTS[1])
    store.delete(LISTS[1].root)
    store.keeping.pin(MANIFEST.model_id)
    with store.keeping.use([LISTS[1].root]):
        download(store, 1)
        store.evict([LISTS[1].root, LISTS[3].root], pins=frozenset({MANIFEST.model_id}))
    store.keeping.unpin(MANIFEST.model_id)


def steps_of_life() -> list[str]:
    fs = FaultyFileSystem(HOME)
    life(make_store(fs))
    return fs.log


STEPS = steps_of_life()


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_at_any_step_leaves_nothing_wrong_and_the_download_can_be_finished(seed: int) -> None:
    for step in range(len(STEPS)):
        fs = FaultyFileSystem(HOME, seed=seed)
        fs.cut_power_at(step)
        with pytest.raises(PowerCut):
            life(make_store(fs))
        fs = fs.after_power_cut()
        check_nothing_wrong_visible(fs)
        life(make_store(fs))
        assert visible(fs) == {LISTS[i].root: OBJECTS[i] for i in (1, 2)}


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_at_any_step_leaves_nothing_wrong_locked_or_in_use(seed: int) -> None:
    for step in range(len(STEPS)):
        fs = FaultyFileSystem(HOME, seed=seed)
        fs.kill_at(step)
        with pytest.raises(Killed):
            life(make_store(fs))
        fs.after_kill()
        check_nothing_wrong_visible(fs)
        life(make_store(fs))
        for disk in (fs, fs.after_power_cut()):
            assert visible(disk) == {LISTS[i].root: OBJECTS[i] for i in (1, 2)}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_call_may_fail_and_the_next_attempt_succeeds(code: int) -> None:
    expected = DiskFull if code == errno.ENOSPC else StorageError
    for step, call in enumerate(STEPS):
        fs = FaultyFileSystem(HOME)
        fs.fail_at(step, code)
        store = make_store(fs)
        # What a download cannot read of its file, it fetches again. The list of a use may stay empty or behind.
        harmless = call.startswith(("pread", "touch")) or "/uses/" in "".join(STEPS[max(0, step - 2) : step + 1])
        with suppress(StorageError) if harmless else pytest.raises(expected):
            life(store)
        check_nothing_wrong_visible(fs)
        life(store)  # the same process goes on
        assert visible(fs) == {LISTS[i].root: OBJECTS[i] for i in (1, 2)}
        fs = fs.after_power_cut()
        assert visible(fs) == {LISTS[i].root: OBJECTS[i] for i in (1, 2)}


@pytest.mark.parametrize("capacity", [0, 7, 8, 9, CHUNK_SIZE, CHUNK_SIZE + 15])
def test_a_full_disk_is_said_before_anything_is_fetched(capacity: int) -> None:
    fs = FaultyFileSystem(HOME, capacity=capacity)
    store = make_store(fs)
    with pytest.raises(DiskFull), store.open_partial(LISTS[2].root, LISTS[2]):
        pytest.fail("the space was not reserved")
    assert fs.files(ROOT / "partial") == {}
    fs.capacity = BUDGET
    assert store.usage().used_bytes == 0
    download(store, 2)
    assert set(visible(fs)) == {LISTS[2].root}


def test_a_commit_that_could_not_sync_its_directory_can_be_repeated() -> None:
    fs = FaultyFileSystem(HOME)
    store = make_store(fs)
    with store.open_partial(LISTS[2].root, LISTS[2]) as partial:
        fill(partial, 2)
        fs.fail_next("fsync_dir", f"{LISTS[2].root[:2]}", errno.EIO)
        with pytest.raises(StorageError):
            partial.commit()
        partial.commit()
    assert set(visible(fs.after_power_cut())) == {LISTS[2].root}


def test_what_was_synced_survives_a_power_cut() -> None:
    fs = FaultyFileSystem(HOME, seed=1)
    with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
        partial.write_chunk(0, OBJECTS[2][:CHUNK_SIZE])
        partial.sync()
        fs = fs.after_power_cut()
    with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
        assert 0 not in partial.missing()


def test_bytes_that_could_not_be_synced_are_fetched_again() -> None:
    """The kernel may call them clean afterwards, and no later sync would tell."""
    fs = FaultyFileSystem(HOME)
    with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
        partial.write_chunk(0, OBJECTS[2][:CHUNK_SIZE])
        fs.fail_next("fdatasync", "", errno.EIO)
        with pytest.raises(StorageError):
            partial.sync()
        with pytest.raises(StorageError):
            partial.write_chunk(0, OBJECTS[2][:CHUNK_SIZE])
    assert fs.files(ROOT / "partial") == {}


def test_bytes_whose_sync_failed_just_before_a_kill_are_synced_all_the_same() -> None:
    """Nobody was left to discard them. The next process finds them right, in a cache that calls them clean."""
    for seed in range(8):
        fs = FaultyFileSystem(HOME, seed=seed)
        with suppress(Killed), make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
            fill(partial, 2)
            fs.fail_next("fdatasync", "", errno.EIO)
            fs.kill_at(fs.steps + 1)
            partial.commit()
        fs.after_kill()
        with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
            assert not partial.missing()
            partial.commit()
        assert visible(fs.after_power_cut()) == {LISTS[2].root: OBJECTS[2]}


def test_what_an_earlier_process_left_is_synced_before_anything_is_added() -> None:
    """Right bytes in a cache: a download that goes on makes them durable with its first sync, not with its last."""
    for seed in range(8):
        fs = FaultyFileSystem(HOME, seed=seed)
        with suppress(Killed), make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
            partial.write_chunk(0, chunk_of(2, 0))
            fs.kill_at(fs.steps)
            partial.sync()
        fs.after_kill()
        with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
            assert 0 not in partial.missing()
            partial.sync()
            fs = fs.after_power_cut()
        with make_store(fs).open_partial(LISTS[2].root, LISTS[2]) as partial:
            assert 0 not in partial.missing()


def test_syncing_what_nobody_wrote_does_nothing() -> None:
    fs = FaultyFileSystem(HOME)
    store = make_store(fs)
    with store.open_partial(LISTS[2].root, LISTS[2]) as partial:
        before = list(fs.log)
        partial.sync()
        assert fs.log == before
        fill(partial, 2)
        partial.sync()
        partial.commit()
        before = list(fs.log)
        partial.sync()
        assert fs.log == before


# --- the budget, where a power cut brings back what was removed -------------------------------------------------------


def _evict(store: ContentStore) -> None:
    store.evict(HASHES, pins=frozenset())


def _delete(store: ContentStore) -> None:
    store.delete(HASHES[3])


def _discard(store: ContentStore) -> None:
    """A download that is given up; and one that brought nothing, which gives its room back."""
    store.delete(HASHES[3])
    with store.open_partial(HASHES[3], LISTS[3]) as partial:
        partial.write_chunk(0, chunk_of(3, 0))
        partial.discard()
    with store.open_partial(HASHES[3], LISTS[3]):
        pass


def _sweep(store: ContentStore) -> None:
    store.delete(HASHES[3])
    with store.open_partial(HASHES[3], LISTS[3]) as partial:
        partial.write_chunk(0, chunk_of(3, 0))
    store.sweep(max_age=-1.0)


def full_store() -> tuple[FaultyFileSystem, ContentStore]:
    fs = FaultyFileSystem(HOME)
    store = make_store(fs)
    for which in range(len(OBJECTS)):
        download(store, which)
    assert store.usage().used_bytes == BUDGET
    return fs, store


@pytest.mark.parametrize("killed", [False, True], ids=["fails", "killed"])
@pytest.mark.parametrize("remove", [_evict, _delete, _discard, _sweep])
def test_room_is_not_filled_before_what_was_in_it_is_gone_for_good(
    remove: Callable[[ContentStore], None], killed: bool
) -> None:
    """A process removes things and fails, or is killed, at any step; another one fills the room; then the power goes.

    What the first one removed may come back then: it had not been synced. The second one has to do that first.
    """
    fs, store = full_store()
    first = fs.steps
    remove(store)
    for step in range(first, fs.steps):
        disk, store = full_store()
        other = make_store(disk)
        if killed:
            disk.kill_at(step)
        else:
            disk.fail_at(step, errno.EIO)
        with suppress(StorageError, Killed):
            remove(store)
        if killed:
            disk.after_kill()
        for which in (3, 2, 1):
            with suppress(StorageError), other.open_partial(HASHES[which], LISTS[which]) as partial:
                fill(partial, which)
        after = disk.after_power_cut(undoing_removals=True)
        assert make_store(after).usage().used_bytes <= BUDGET, fs.log[step]


# --- a state machine --------------------------------------------------------------------------------------------------

COPIES = st.dictionaries(st.sampled_from(HASHES), st.integers(0, 1))
SOME = st.sets(st.sampled_from(HASHES), min_size=1).map(frozenset)


@dataclass
class _Use:
    context: AbstractContextManager[None]
    objects: frozenset[ShardHash]
    protects: bool = True  # False: somebody deleted its file


class KeepingUnderFire(StoreUnderFire):
    """The same with pins, uses, evictions, garbage collection, clocks that jump and metadata that is lost.

    Each process is a node that announces what it has verified, and uses it for as long as it does so.
    """

    pinned = False  # for sure: a pin that failed half-way may be there too

    def start_processes(self) -> None:
        super().start_processes()
        self.uses: list[_Use] = []
        self.holdings: list[Holdings | None] = [None, None]
        self.deleted: set[ShardHash] = set()  # by a user who does not ask, since they were announced

    # --- processes ----------------------------------------------------------------------------------------------------

    @rule(process=st.integers(0, 1), objects=SOME)
    def use(self, process: int, objects: frozenset[ShardHash]) -> None:
        context = self.stores[process].keeping.use(objects)
        if self.attempt(context.__enter__):
            self.uses.append(_Use(context, objects))

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def end_use(self, data: st.DataObject) -> None:
        use = self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1)))
        self.attempt(lambda: use.context.__exit__(None, None, None))

    @rule(process=st.integers(0, 1))
    def announce(self, process: int) -> None:
        store = self.stores[process] = make_store(self.fs)  # a node that has just started: it knows nothing yet
        context = store.keeping.use(HASHES)
        if not self.attempt(context.__enter__):
            return
        self.uses.append(_Use(context, frozenset(HASHES)))
        right = visible(self.fs)
        holdings = Holdings(MANIFEST, store, on_change=lambda: None)
        if self.attempt(lambda: holdings.verify(MANIFEST.shards)):
            self.holdings[process] = holdings
            self.deleted.clear()
            for key in holdings.experts:
                root = MANIFEST.experts[key].hash
                assert right[root] == CONTENT[root], "announced, and wrong"

    @precondition(lambda self: any(self.holdings))
    @rule(data=st.data(), which=st.integers(0, len(OBJECTS) - 1))
    def serve(self, data: st.DataObject, which: int) -> None:
        holdings = data.draw(st.sampled_from([holdings for holdings in self.holdings if holdings]))
        root, length = HASHES[which], min(5, len(OBJECTS[which]))
        served: list[bytes | None] = []
        if length:
            self.attempt(lambda: served.append(holdings.read_range(root, 0, length)))
        assert all(data in (None, OBJECTS[which][:length]) for data in served)

    # --- keeping ------------------------------------------------------------------------------------------------------

    @rule(process=st.integers(0, 1), pin=st.booleans())
    def pin(self, process: int, pin: bool) -> None:
        keeping = self.stores[process].keeping
        change = keeping.pin if pin else keeping.unpin
        self.pinned = self.attempt(lambda: change(MANIFEST.model_id)) and pin

    @rule(process=st.integers(0, 1), objects=SOME)
    def evict(self, process: int, objects: frozenset[ShardHash]) -> None:
        store, before = self.stores[process], set(visible(self.fs))
        self.durable -= objects - self._in_use()
        self.attempt(lambda: store.evict(objects, pins=store.keeping.now().pins))
        assert before & self._in_use() <= set(visible(self.fs)), "evicted in use"

    @rule(
        process=st.integers(0, 1),
        copies=st.dictionaries(st.sampled_from(HASHES), st.integers(0, 1)),
        force=st.booleans(),
    )
    def collect(self, process: int, copies: dict[ShardHash, int], force: bool) -> None:
        store, before = self.stores[process], set(visible(self.fs))
        kept = before & (self._in_use() | (CONTENT.keys() if self.pinned and HASHES[4] not in before else set()))
        if self.pinned and HASHES[4] in before - self.rotten:
            kept |= before & {HASHES[4], *(shard.hash for shard in MANIFEST.shards)}
        if not force:
            kept |= {key for key in before if not copies.get(key)}
        self.durable &= kept

        def run() -> None:
            catalogue = Cataloguer(store, fs=self.fs).take()
            plan = plan_prune(catalogue, copies, PruneRequest(force=force))
            assert force or all(one.rank is Rank.PARTIAL or copies[one.hash] for one in plan.victims)
            store.evict([victim.hash for victim in plan.victims], pins=catalogue.kept.pins)

        self.attempt(run)
        assert kept - self.rotten <= set(visible(self.fs)), "lost what had to stay"

    @rule(jump=st.floats(-1e10, 1e10))
    def jump(self, jump: float) -> None:
        self.fs.now += jump

    @rule(what=st.sampled_from(["uses", "pins"]))
    def lose_metadata(self, what: str) -> None:
        self.fs.lose(ROOT / what)
        if what == "pins":
            self.pinned = False
        else:
            for use in self.uses:
                use.protects = False

    def _in_use(self) -> frozenset[ShardHash]:
        return frozenset().union(*(use.objects for use in self.uses if use.protects))


KeepingUnderFire.TestCase.settings = settings(stateful_step_count=40)
TestKeepingUnderFire = KeepingUnderFire.TestCase
