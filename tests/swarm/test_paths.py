"""Where things are kept."""

from __future__ import annotations

from pathlib import Path

from support.swarm_fakes import MODEL

from moehive.swarm.paths import Paths


def test_all_below_one_home() -> None:
    paths = Paths.of({"MOEHIVE_HOME": "/h"})
    assert (paths.identity, paths.settings) == (Path("/h/data/identity.key"), Path("/h/config/config.toml"))
    assert (paths.store, paths.skeleton(MODEL)) == (Path("/h/cache/store"), Path("/h/cache/models", MODEL))


def test_an_empty_home_is_none() -> None:
    assert Paths.of({"MOEHIVE_HOME": ""}) == Paths.of({})


def test_cleaning_the_cache_does_not_change_who_a_peer_is() -> None:
    paths = Paths.of({})
    assert paths.cache not in paths.identity.parents
    assert paths.cache not in paths.settings.parents


def test_looking_creates_nothing(tmp_path: Path) -> None:
    Paths.of({"MOEHIVE_HOME": str(tmp_path / "home")}).skeleton(MODEL)
    assert not (tmp_path / "home").exists()
