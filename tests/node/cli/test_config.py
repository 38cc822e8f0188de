"""Flag before environment before file before default; nothing unknown is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moehive.node.cli.app import build_app
from moehive.node.cli.config import config_sources
from moehive.node.cli.node import NodeOptions, settings_of

COMMANDS = ("node", "generate")


@pytest.fixture
def options(home: Path, converted: Path):
    """NodeSettings as `moehive node` makes them from the arguments, the environment and config.toml."""

    def read(*arguments: str, config: Path | None = None) -> Any:
        app = build_app({})
        app.config = config_sources(config, home / "config" / "config.toml", commands=COMMANDS)
        _, bound, _ = app.parse_args(["node", str(converted), *arguments])
        return settings_of(bound.arguments["model"], bound.arguments.get("options", NodeOptions()), {})

    return read


@pytest.fixture
def settings_file(home: Path):
    """Write config.toml."""

    def write(text: str, path: Path = home / "config" / "config.toml") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_defaults(options):
    settings = options()

    assert (settings.experts, settings.ram, settings.disk, settings.skeleton) == ("auto", None, 20 << 30, True)
    assert settings.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert settings.join is None


def test_precedence(options, settings_file, monkeypatch):
    settings_file('[node]\nram = "1GiB"\n')
    assert options().ram == 1 << 30

    monkeypatch.setenv("MOEHIVE_NODE_RAM", "2GiB")
    assert options().ram == 2 << 30

    assert options("--ram", "3GiB").ram == 3 << 30


def test_uploads(options):
    settings = options()
    assert (settings.bulk_port, settings.upload_rate, settings.upload_slots) == (0, None, 8)
    settings = options("--bulk-port", "4002", "--upload-rate", "50MB/s", "--upload-slots", "3")
    assert (settings.bulk_port, settings.upload_rate, settings.upload_slots) == (4002, 50_000_000, 3)


def test_each_source_adds_what_the_stronger_ones_leave_open(options, settings_file, monkeypatch):
    settings_file('[node]\nexperts = "none"\nram = 4096\n')
    monkeypatch.setenv("MOEHIVE_NODE_DISK", "5MiB")

    settings = options("--threads", "2")

    assert (settings.experts, settings.ram, settings.disk, settings.threads) == ("none", 4096, 5 << 20, 2)


def test_lists_and_flags_in_the_file_and_the_environment(options, settings_file, monkeypatch):
    settings_file('[node]\nlisten = ["0.0.0.0:4001", "/ip6/::/tcp/4001"]\nskeleton = false\n')
    settings = options()
    assert settings.listen == ("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001")
    assert settings.skeleton is False

    monkeypatch.setenv("MOEHIVE_NODE_SKELETON", "true")
    monkeypatch.setenv("MOEHIVE_NODE_LISTEN", "127.0.0.1:1 127.0.0.1:2")
    settings = options()
    assert settings.listen == ("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/2")
    assert settings.skeleton is True


def test_another_file_replaces_the_usual_one(options, settings_file, tmp_path):
    settings_file('[node]\nram = "1GiB"\nthreads = 7\n')
    other = settings_file('[node]\nram = "2GiB"\n', tmp_path / "other.toml")

    settings = options(config=other)

    assert (settings.ram, settings.threads) == (2 << 30, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[node]\nrma = 1\n", "rma"),
        ("[nod]\nram = 1\n", "'nod'"),
        ('ram = "1GiB"\n', "'ram'"),
        ("node = 3\n", "write [node]"),
        ("[node\n", "is not TOML"),
        ('[node]\nram = "many"\n', "many"),
        ('[node]\nlisten = ["nowhere"]\n', "nowhere"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_and_key(moehive, settings_file, converted, text, said):
    path = settings_file(text)

    outcome = moehive("node", converted)

    assert outcome.code == 2
    assert said in outcome.err
    assert str(path) in outcome.err or "--" in outcome.err


def test_a_file_that_was_named_must_exist(moehive, tmp_path, converted):
    outcome = moehive("--config", tmp_path / "none.toml", "node", converted)

    assert outcome.code == 2
    assert "none.toml does not exist" in outcome.err


@pytest.mark.parametrize("name", ["", "file/below"])
def test_what_was_named_must_be_a_file(moehive, tmp_path, converted, name):
    (tmp_path / "file").touch()
    outcome = moehive("--config", tmp_path / name, "node", converted)

    assert outcome.code == 2
    assert "is no file" in outcome.err


def test_variables_of_others_are_left_alone(options, monkeypatch):
    monkeypatch.setenv("MOEHIVE_NODE_SERVICE_HOST", "10.0.0.1")  # Kubernetes, for a service called moehive-node

    assert options() == options()


def test_a_wrong_variable_is_an_error_that_names_it(moehive, monkeypatch, converted):
    monkeypatch.setenv("MOEHIVE_NODE_RAM", "lots")

    outcome = moehive("node", converted)

    assert outcome.code == 2
    assert "MOEHIVE_NODE_RAM" in outcome.err
