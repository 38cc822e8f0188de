"""Real node processes, which are ended after each test, and converted checkpoints, which are kept for the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from support.processes import Nodes
from transformers.utils import logging


@pytest.fixture(scope="session")
def _nodes_of_session() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(_nodes_of_session: Nodes) -> Iterator[Nodes]:
    """Starts nodes; none of them outlives the test."""
    try:
        yield _nodes_of_session
    finally:
        _nodes_of_session.end_all()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A client's empty cache."""
    return tmp_path / "cache"
