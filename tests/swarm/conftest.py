"""Checkpoints, a converted one for tests that need some real model, and a hub on loopback that serves the sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import Checkpoints
from support.hub_server import HubServer

from moehive.swarm.store.directory import ConvertedDirectory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def mixtral(checkpoints: Checkpoints) -> ConvertedDirectory:
    """A converted tiny Mixtral: read only."""
    return ConvertedDirectory(checkpoints.converted("mixtral"))


@pytest.fixture
def hub(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub that huggingface_hub of this process talks to; its cache is empty."""
    from huggingface_hub import constants

    repos = {f"org/{family}": checkpoints.source(family) for family in ("mixtral", "deepseek_v3_fp8")}
    with HubServer(repos) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants._HF_DEFAULT_ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + path)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield server
