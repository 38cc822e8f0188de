"""A skeleton laid out as a Hugging Face directory: links, repaired, and never whole in looks only."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moehive.protocol.manifest import MANIFEST_NAME
from moehive.swarm.skeleton import lay_out_skeleton
from moehive.swarm.store.base import NotHeld
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory


def test_laying_out_links_and_can_be_repeated(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    target = lay_out_skeleton(mixtral.manifest, mixtral, tmp_path / "model")
    shard = mixtral.manifest.skeleton[0]
    assert (target / shard.file).samefile(mixtral.root / shard.file)
    lay_out_skeleton(mixtral.manifest, mixtral, target)
    assert {path.name for path in target.rglob("*") if path.is_file()} == {
        MANIFEST_NAME,
        *(Path(shard.file).name for shard in mixtral.manifest.skeleton),
    }


def test_laying_out_replaces_what_is_wrong(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    shard = mixtral.manifest.skeleton[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / shard.file).write_bytes(b"other")
    (tmp_path / "model" / MANIFEST_NAME).write_bytes(b"{}")
    target = lay_out_skeleton(mixtral.manifest, mixtral, tmp_path / "model")
    assert (target / shard.file).read_bytes() == (mixtral.root / shard.file).read_bytes()
    assert ConvertedDirectory(target).model_id == mixtral.model_id


def test_copies_where_links_are_not_possible(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", no_links)
    target = lay_out_skeleton(mixtral.manifest, mixtral, tmp_path / "model")
    shard = mixtral.manifest.skeleton[0]
    assert not (target / shard.file).samefile(mixtral.root / shard.file)
    assert (target / shard.file).read_bytes() == (mixtral.root / shard.file).read_bytes()


def test_without_the_objects_there_is_no_directory_that_looks_whole(
    mixtral: ConvertedDirectory, tmp_path: Path
) -> None:
    with pytest.raises(NotHeld):
        lay_out_skeleton(mixtral.manifest, ContentStore(tmp_path / "store", 1 << 30), tmp_path / "model")
    assert not (tmp_path / "model" / MANIFEST_NAME).exists()


def test_several_threads_lay_out_the_same_model(mixtral: ConvertedDirectory, tmp_path: Path) -> None:
    target, start = tmp_path / "model", threading.Barrier(4)

    def lay_out(_: int) -> None:
        start.wait(30)
        lay_out_skeleton(mixtral.manifest, mixtral, target)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lay_out, range(4)))
    assert not [path for path in target.rglob(".*") if path.is_file()]


def test_what_another_one_has_just_placed_leaves_no_litter(
    mixtral: ConvertedDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rename(2) of a link to the file that is there already does nothing, and keeps both names."""
    target = lay_out_skeleton(mixtral.manifest, mixtral, tmp_path / "model")
    monkeypatch.setattr(Path, "samefile", lambda *_: False)  # as if it appeared after we looked
    lay_out_skeleton(mixtral.manifest, mixtral, target)
    assert not [path for path in target.rglob(".*") if path.is_file()]
