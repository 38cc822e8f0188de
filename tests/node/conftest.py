"""Checkpoints, and a converted one for tests that need some real model."""

from __future__ import annotations

import pytest
from support.checkpoints import Checkpoints

from moehive.swarm.store.directory import ConvertedDirectory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def mixtral(checkpoints: Checkpoints) -> ConvertedDirectory:
    """A converted tiny Mixtral: read only."""
    return ConvertedDirectory(checkpoints.converted("mixtral"))
