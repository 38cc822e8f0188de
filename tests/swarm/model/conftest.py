"""Tiny checkpoints of every family and their conversions, each made once per session."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.checkpoints import Checkpoints
from transformers.utils import logging


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def converted(checkpoints: Checkpoints) -> Path:
    """A converted Qwen3-MoE directory: read only."""
    return checkpoints.converted("qwen3_moe")


@pytest.fixture
def own_copy(converted: Path, tmp_path: Path) -> Path:
    """The same directory to be damaged."""
    return Path(copytree(converted, tmp_path / "copy"))


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """Token ids [2, 24]."""
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(7))
