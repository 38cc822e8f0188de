"""Files under a second name: a link, a clone or a copy, and always all of it at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moehive.swarm import placing
from moehive.swarm.placing import place, write_file

CLONED = b"cloned"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path


def without_links(*_: object) -> None:
    raise OSError(errno.EXDEV, "not on this file system")


def cloning(target: int, request: int, source: int) -> int:
    """An ioctl that can clone, so that it shows."""
    assert request == 0x40049409
    os.write(target, CLONED)
    return 0


def test_a_link_where_nobody_will_write(source: Path, tmp_path: Path) -> None:
    place(source, tmp_path / "deep" / "target")
    assert (tmp_path / "deep" / "target").samefile(source)


def test_a_clone_where_the_user_may_write(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing.fcntl, "ioctl", cloning)
    place(source, tmp_path / "target", independent=True)
    assert (tmp_path / "target").read_bytes() == CLONED


def test_a_clone_before_a_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing.fcntl, "ioctl", cloning)
    monkeypatch.setattr(os, "link", without_links)
    place(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CLONED


@pytest.mark.parametrize("independent", [False, True])
def test_a_copy_where_nothing_else_works(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, independent: bool
) -> None:
    monkeypatch.setattr(placing.fcntl, "ioctl", without_links)
    monkeypatch.setattr(os, "link", without_links)
    place(source, tmp_path / "target", independent=independent)
    assert not (tmp_path / "target").samefile(source)
    assert (tmp_path / "target").read_bytes() == b"content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_what_was_there_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"other")
    place(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"
    write_file(tmp_path / "target", b"written")
    assert (tmp_path / "target").read_bytes() == b"written"
    assert source.read_bytes() == b"content", "the link was replaced, not written through"
