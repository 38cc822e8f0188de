"""What a node says that it holds is what it has verified, and it stops saying so when a file goes bad."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest

from moehive.node.holdings import Holdings
from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import Manifest
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.partials import Partials

KEY = ExpertKey(0, 3)


class Held:
    """Holdings over a directory that may be damaged."""

    def __init__(self, root: Path) -> None:
        self.source = ConvertedDirectory(root)
        self.manifest: Manifest = self.source.manifest
        self.claims: list[int] = []
        self.holdings = Holdings(self.manifest, self.source, on_change=self.changed)
        self.shard = self.manifest.experts[KEY]

    def changed(self) -> None:
        self.claims.append(len(self.holdings.experts))

    def damage(self, file: str) -> None:
        path = self.source.root / file
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.fixture
def held(mixtral: ConvertedDirectory, tmp_path: Path) -> Held:
    return Held(Path(copytree(mixtral.root, tmp_path / "copy")))


def test_nothing_is_held_before_it_is_verified(held: Held) -> None:
    assert not held.holdings.experts
    assert not held.holdings.skeleton
    assert not held.holdings.holds(*KEY)
    assert held.holdings.chunk_list(held.shard.hash) is None
    assert held.holdings.read_range(held.shard.hash, 0, 1) is None


def test_what_is_verified_is_held_and_served(held: Held) -> None:
    held.holdings.verify([held.shard])
    assert held.holdings.experts == {KEY}
    assert held.holdings.expert_bytes == held.shard.size
    assert held.holdings.holds(*KEY)
    assert not held.holdings.holds(0, 4)
    assert not held.holdings.holds(99, 99)
    chunks = held.holdings.chunk_list(held.shard.hash)
    assert chunks is not None
    assert chunks.root == held.shard.hash
    data = (held.source.root / held.shard.file).read_bytes()
    assert held.holdings.read_range(held.shard.hash, 5, 20) == data[5:25]
    assert held.claims == [1]


def test_a_damaged_or_missing_file_is_left_out(held: Held) -> None:
    held.damage(held.shard.file)
    gone = held.manifest.experts[ExpertKey(1, 1)]
    (held.source.root / gone.file).unlink()
    held.holdings.verify(held.manifest.experts.values())
    assert held.holdings.experts == set(held.manifest.experts) - {KEY, ExpertKey(1, 1)}


def test_a_file_that_goes_bad_while_it_is_served_is_dropped(held: Held) -> None:
    held.holdings.verify([held.shard])
    held.damage(held.shard.file)
    assert held.holdings.read_range(held.shard.hash, 0, held.shard.size) is None
    assert not held.holdings.holds(*KEY)
    assert held.claims == [1, 0]
    assert held.holdings.read_range(held.shard.hash, 0, held.shard.size) is None
    assert held.claims == [1, 0]


def test_dropping_what_is_not_held_changes_nothing(held: Held) -> None:
    held.holdings.drop(held.shard.hash)
    held.holdings.drop(ShardHash("0" * 64))
    assert held.claims == []


def test_the_manifest_is_always_served(held: Held) -> None:
    chunks = held.holdings.chunk_list(ShardHash(held.manifest.model_id))
    assert chunks is not None
    assert chunks.root == held.manifest.model_id


def test_the_skeleton_is_whole_or_not_held(held: Held) -> None:
    held.holdings.verify(held.manifest.skeleton[1:])
    assert not held.holdings.skeleton
    held.holdings.add(held.manifest.skeleton[0])
    assert held.holdings.skeleton


def test_a_seed_supplies_everything_and_holds_what_it_was_told_to(held: Held) -> None:
    held.holdings.verify([held.shard])
    assert not held.holdings.complete
    held.holdings.verify_seed()
    assert held.holdings.complete
    assert held.holdings.experts == {KEY}
    other = held.manifest.experts[ExpertKey(1, 1)]
    assert held.holdings.chunk_list(other.hash) is not None
    assert not held.holdings.holds(1, 1)
    held.damage(other.file)
    assert held.holdings.read_range(other.hash, 0, other.size) is None
    assert not held.holdings.complete


def test_no_seed_with_a_damaged_file(held: Held) -> None:
    held.damage(held.shard.file)
    held.holdings.verify_seed()
    assert not held.holdings.complete


def test_what_is_being_downloaded_is_supplied_as_far_as_it_is_verified(held: Held, tmp_path: Path) -> None:
    partials, store = Partials(), ContentStore(tmp_path / "store", 1 << 30)
    data = b"".join(bytes([n + 1]) * CHUNK_SIZE for n in range(3)) + b"tail"
    chunks = ChunkList.of(data)
    holdings = Holdings(held.manifest, held.source, on_change=lambda: None, partials=partials)
    assert holdings.chunk_list(chunks.root) is None
    assert holdings.have(chunks.root) == 0
    with store.open_partial(chunks.root, chunks) as partial, partials.offered(partial):
        for index in (1, 3):
            partial.write_chunk(index, data[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE])
        assert holdings.chunk_list(chunks.root) == chunks
        assert holdings.have(chunks.root) == 0b1010
        assert holdings.read_range(chunks.root, CHUNK_SIZE, CHUNK_SIZE) == bytes([2]) * CHUNK_SIZE
        assert holdings.read_range(chunks.root, 3 * CHUNK_SIZE, 4) == b"tail"
        for offset, length in [(0, CHUNK_SIZE), (CHUNK_SIZE, 5), (CHUNK_SIZE + 1, 5), (4 * CHUNK_SIZE, 1)]:
            assert holdings.read_range(chunks.root, offset, length) is None
    assert holdings.chunk_list(chunks.root) is None
    assert holdings.read_range(chunks.root, CHUNK_SIZE, CHUNK_SIZE) is None


def test_of_what_is_held_everything_can_be_had(held: Held) -> None:
    held.holdings.verify([held.shard])
    assert held.holdings.have(held.shard.hash) == EVERYTHING
    assert held.holdings.have(ShardHash(held.manifest.model_id)) == EVERYTHING


def test_loading_is_told_at_both_ends(held: Held) -> None:
    seen: list[bool] = []
    holdings = Holdings(held.manifest, held.source, on_change=lambda: seen.append(holdings.is_loading))
    with holdings.loading():
        assert holdings.is_loading
    assert seen == [True, False]


def test_what_is_left_is_no_longer_announced_or_computed(held: Held) -> None:
    held.holdings.verify([held.shard])
    held.claims.clear()
    held.holdings.leave([held.shard])
    assert held.claims == [0]
    assert not held.holdings.holds(*KEY)
    assert held.holdings.chunk_list(held.shard.hash) is None
