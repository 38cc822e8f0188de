"""The command line inside the test process, and a small converted model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from moehive.node.cli.app import run
from moehive.node.demo import bundled_checkpoint
from moehive.swarm.convert import convert


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str


Moehive = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """Commands configure logging for their whole process."""
    root, ours = logging.getLogger(), logging.getLogger("moehive")
    before = root.handlers, root.level, ours.level
    yield
    root.handlers, root.level, ours.level = before
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's MOEHIVE_HOME."""
    monkeypatch.setenv("MOEHIVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def moehive(home: Path, capsys: pytest.CaptureFixture[str]) -> Moehive:
    """Run one command line."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The bundled checkpoint; not to be written to."""
    with bundled_checkpoint() as path:
        return path


@pytest.fixture(scope="session")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conversion; not to be written to."""
    destination = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint, destination, name="demo")
    return destination
