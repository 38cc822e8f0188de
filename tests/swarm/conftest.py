"""A converted checkpoint for tests that need some real model."""

from __future__ import annotations

import pytest
from support.checkpoints import Checkpoints

from moehive.swarm.store.directory import ConvertedDirectory


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ConvertedDirectory:
    """A converted tiny Mixtral: read only."""
    return ConvertedDirectory(Checkpoints(tmp_path_factory.mktemp("mixtral")).converted("mixtral"))
