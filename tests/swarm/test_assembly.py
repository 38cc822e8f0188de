"""A directory that is put together is complete and verified, or visibly unfinished, whatever it held before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from moehive.protocol.errors import DestinationError, DiskFull
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import MANIFEST_NAME, Manifest, ShardEntry
from moehive.swarm.assembly import WORK, Assembly
from moehive.swarm.convert import inspect
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.progress import TransferProgress
from moehive.swarm.whole_model import ModelFetch


class Silent:
    """A watcher that is not interested."""

    def begin(self, manifest: Manifest, total: int) -> None: ...

    def found(self, size: int) -> None: ...

    def transfer(self, progress: TransferProgress) -> None: ...


@pytest.fixture
def cache(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "cache", 1 << 30)


@pytest.fixture
def shards(mixtral: ConvertedDirectory) -> list[ShardEntry]:
    return list(mixtral.manifest.shards)


def assemble(mixtral: ConvertedDirectory, root: Path, shards: list[ShardEntry], cache: ContentStore) -> list[str]:
    """Put it together, downloading what is missing; the files that were downloaded."""
    found: list[int] = []
    assembly = Assembly(root, mixtral.manifest)
    assembly.begin()
    missing = assembly.find(shards, cache, found.append)
    assert sum(found) == sum(shard.size for shard in shards) - sum(shard.size for shard in missing)
    for shard in missing:
        assembly.store.put(mixtral.root / shard.file, expected=shard.hash)
    assembly.finish(shards)
    return [shard.file for shard in missing]


def test_a_whole_model(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    root = tmp_path / "deep" / "model"
    assert len(assemble(mixtral, root, shards, cache)) == len(shards)
    report = inspect(root, expect=mixtral.model_id)
    assert report.faults == ()
    assert not (root / WORK).exists()
    assert assemble(mixtral, root, shards, cache) == [], "it is there already"


def test_what_the_cache_holds_is_not_fetched_and_stays_what_it_is(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    for shard in shards[:-3]:
        cache.put(mixtral.root / shard.file)
    fetched = assemble(mixtral, tmp_path / "model", shards, cache)
    assert fetched == [shard.file for shard in shards[-3:]]
    assert inspect(tmp_path / "model").ok
    for key in cache.objects():
        cache.verify(key)


def test_a_damaged_object_of_the_cache_is_not_believed(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    for shard in shards:
        cache.put(mixtral.root / shard.file)
    path = cache.path(shards[-1].hash)
    assert path is not None
    path.write_bytes(bytes(shards[-1].size))
    assert assemble(mixtral, tmp_path / "model", shards, cache) == [shards[-1].file]
    assert not cache.has(shards[-1].hash)
    assert inspect(tmp_path / "model").ok


def test_some_experts_first_and_the_others_later(
    mixtral: ConvertedDirectory, tmp_path: Path, cache: ContentStore
) -> None:
    manifest, root = mixtral.manifest, tmp_path / "model"
    some = [*manifest.skeleton, manifest.experts[ExpertKey(0, 0)]]
    assemble(mixtral, root, some, cache)
    held = ConvertedDirectory(root)
    assert held.path(manifest.experts[ExpertKey(0, 0)].hash) is not None
    assert held.path(manifest.experts[ExpertKey(0, 1)].hash) is None
    assert len(assemble(mixtral, root, list(manifest.shards), cache)) == len(manifest.shards) - len(some)
    assert inspect(root).ok


def test_an_interrupted_one_has_no_manifest_and_goes_on(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    root = tmp_path / "model"
    cache.put(mixtral.root / shards[0].file)
    first = Assembly(root, mixtral.manifest)
    first.begin()
    missing = first.find(shards, cache, lambda size: None)
    first.store.put(mixtral.root / missing[0].file)  # and then the process is killed
    assert not (root / MANIFEST_NAME).exists()
    second = Assembly(root, mixtral.manifest)
    second.begin()
    again = second.find(shards, cache, lambda size: None)
    assert [shard.file for shard in again] == [shard.file for shard in missing]
    assert second.store.has(missing[0].hash), "not fetched twice"
    for shard in again:
        second.store.put(mixtral.root / shard.file)
    second.finish(shards)
    assert inspect(root).ok


@pytest.mark.parametrize("steps", range(3, 15))
def test_a_kill_at_any_step(
    mixtral: ConvertedDirectory,
    tmp_path: Path,
    shards: list[ShardEntry],
    cache: ContentStore,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """What is in place is right, and the manifest only stands over a complete directory."""
    root, left = tmp_path / "model", iter(range(steps))

    def dying(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def call(path: Path, target: Path) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(path, target)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(Path, "replace", dying(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            assemble(mixtral, root, shards, cache)
    for shard in shards:
        if (root / shard.file).exists():
            assert (root / shard.file).read_bytes() == (mixtral.root / shard.file).read_bytes()
    assert not (root / MANIFEST_NAME).exists()
    assemble(mixtral, root, shards, cache)
    assert inspect(root).ok


def test_a_damaged_file_in_place_is_fetched_again(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    root = Path(copytree(mixtral.root, tmp_path / "model"))
    (root / shards[3].file).write_bytes(b"damaged")
    (root / shards[4].file).write_bytes(bytes(shards[4].size))
    assert assemble(mixtral, root, shards, cache) == [shards[3].file, shards[4].file]
    assert inspect(root).ok


def test_directories_of_others_are_left_alone(mixtral: ConvertedDirectory, tmp_path: Path, cache: ContentStore) -> None:
    for name, content in (("holds other files, such as notes", "notes"), ("holds another model", MANIFEST_NAME)):
        root = tmp_path / content
        root.mkdir()
        (root / content).write_text("mine")
        with pytest.raises(DestinationError, match=name):
            Assembly(root, mixtral.manifest).begin()
        assert [path.name for path in root.iterdir()] == [content]
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="is a file"):
        Assembly(tmp_path / "file", mixtral.manifest).begin()
    unfinished = tmp_path / "unfinished"
    Assembly(unfinished, mixtral.manifest).begin()
    (unfinished / WORK / "model").write_text("ab" * 32)
    with pytest.raises(DestinationError, match="unfinished download of model abab"):
        Assembly(unfinished, mixtral.manifest).begin()


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    mixtral: ConvertedDirectory,
    tmp_path: Path,
    shards: list[ShardEntry],
    cache: ContentStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Small:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Small)
    (tmp_path / "models").mkdir()
    assembly = Assembly(tmp_path / "models" / "deep" / "model", mixtral.manifest)
    fetch = ModelFetch(None, cache, lambda manifest: shards, Silent())  # type: ignore[arg-type]  # no member is asked
    with pytest.raises(DiskFull, match="are needed"):
        asyncio.run(fetch._into_directory(assembly, mixtral.manifest, shards))
    assert list((tmp_path / "models").iterdir()) == [], "it has begun nothing"


def test_what_has_come_stays_and_so_does_what_was_there_before(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    cache.put(mixtral.root / shards[0].file)
    for name, source, fetched in (("placed", cache, None), ("fetched", ContentStore(tmp_path / "no", 1), shards[1])):
        assembly = Assembly(tmp_path / name, mixtral.manifest)
        assembly.begin()
        assembly.find(shards, source, lambda size: None)
        if fetched is not None:
            assembly.store.put(mixtral.root / fetched.file, expected=fetched.hash)
        assembly.leave()
        assert (tmp_path / name / WORK).exists()
    (tmp_path / "mine").mkdir()
    mine = Assembly(tmp_path / "mine", mixtral.manifest)
    mine.begin()
    mine.leave()
    assert list((tmp_path / "mine").iterdir()) == []
    refused = Assembly(mixtral.root / "config.json", mixtral.manifest)
    with pytest.raises(DestinationError):
        refused.begin()
    refused.leave()
    assert (mixtral.root / "config.json").is_file()


def test_two_files_of_the_same_bytes(
    mixtral: ConvertedDirectory, tmp_path: Path, shards: list[ShardEntry], cache: ContentStore
) -> None:
    """Two assets of a model may well be equal."""
    twin = ShardEntry("twin.json", shards[0].type, shards[0].size, shards[0].hash)
    assembly = Assembly(tmp_path / "model", mixtral.manifest)
    assembly.begin()
    assembly.store.put(mixtral.root / shards[0].file)
    assembly.finish([shards[0], twin])
    assert (tmp_path / "model" / "twin.json").read_bytes() == (mixtral.root / shards[0].file).read_bytes()
    assert (tmp_path / "model" / shards[0].file).read_bytes() == (mixtral.root / shards[0].file).read_bytes()
