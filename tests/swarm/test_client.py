"""The Python client without a network: one caller for each model whoever asks for it, and a fresh start each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.swarm_fakes import MODEL, SECRET, identity

from moehive.protocol.errors import ConfigError
from moehive.protocol.ticket import Ticket
from moehive.swarm import client as module
from moehive.swarm.client import Swarm, join
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport


@pytest.fixture
def swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Swarm:
    """A client on a network of its own."""
    monkeypatch.setattr(module, "_client_transport", lambda _: MemoryTransport(MemoryNetwork(), identity(9)))
    return join(Ticket(SECRET, ()), cache=tmp_path)


def test_statistics_are_those_of_a_loaded_model(swarm: Swarm) -> None:
    with swarm, pytest.raises(ConfigError, match="is not loaded"):
        swarm.stats(MODEL)


def test_before_joining_the_message_says_what_to_do(swarm: Swarm) -> None:
    with pytest.raises(ConfigError, match="with join"):
        swarm.stats(MODEL)
    with pytest.raises(ConfigError, match="with join"):
        swarm.load(MODEL)


def test_a_device_that_cannot_be_used_is_refused_before_anything_is_fetched(swarm: Swarm) -> None:
    with pytest.raises(ConfigError, match="vram is for experts that are kept here: give ram, too"):
        swarm.load(MODEL, vram=1 << 30)
    with pytest.raises(ConfigError, match="torch finds no device 'cuda:9' here"):
        swarm.load(MODEL, ram=1 << 30, device="cuda:9")


def test_after_a_join_that_failed_nothing_is_joined(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: Ticket) -> MemoryTransport:
        raise ConfigError("no such address")

    monkeypatch.setattr(module, "_client_transport", unreachable)
    with pytest.raises(ConfigError, match="no such address"):
        swarm.__enter__()
    with pytest.raises(ConfigError, match="with join"):
        swarm.stats(MODEL)
