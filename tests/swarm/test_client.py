"""The Python client without a network: one caller for each model whoever asks for it, and a fresh start each time."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import Checkpoints
from support.swarm_fakes import MODEL, SECRET, identity

from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.inventory import Inventory
from moehive.protocol.ticket import Ticket
from moehive.swarm import client as module
from moehive.swarm.client import Swarm, join
from moehive.swarm.directory import Holders
from moehive.swarm.model.seats import backend_of
from moehive.swarm.store.directory import ConvertedDirectory
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
    with pytest.raises(ConfigError, match="vram is memory of a device: say of which"):
        swarm.load(MODEL, ram=1 << 30, vram=1 << 30)


def test_budgets_and_seeds_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk=-1 is no budget"):
        join(Ticket(SECRET, ()), cache=tmp_path, disk=-1)
    with pytest.raises(ConfigError, match=r"write seeds=\['hub:a/b'\]"):
        join(Ticket(SECRET, ()), cache=tmp_path, seeds="hub:a/b")


def test_after_a_join_that_failed_nothing_is_joined(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: Ticket) -> MemoryTransport:
        raise ConfigError("no such address")

    monkeypatch.setattr(module, "_client_transport", unreachable)
    with pytest.raises(ConfigError, match="no such address"):
        swarm.__enter__()
    with pytest.raises(ConfigError, match="with join"):
        swarm.stats(MODEL)


def test_what_is_not_understood_is_refused_before_anybody_is_asked(swarm: Swarm) -> None:
    with swarm:
        with pytest.raises(ConfigError, match="answers='row' is not known; choose one of sum, rows"):
            swarm.load(MODEL, answers="row")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="'demo' is not a model id"):
            swarm.load_expert("demo", 0, 0)
        with pytest.raises(ConfigError, match="'demo' is not a model id"):
            swarm.holders("demo")


def test_another_budget_for_a_model_that_is_loaded_is_refused(swarm: Swarm, checkpoints: Checkpoints) -> None:
    directory = checkpoints.converted("demo")
    with swarm:
        swarm.load(directory)
        swarm.load(directory)
        with pytest.raises(ConfigError, match="is loaded with ram=0 already, not 1048576"):
            swarm.load(directory, ram=1 << 20)
    with swarm:
        swarm.load(directory, ram=1 << 20)
        swarm.load(directory)  # the same budget, unsaid
        swarm.load(directory, ram=1 << 20)


def test_another_device_for_a_model_that_is_loaded_is_refused(swarm: Swarm, checkpoints: Checkpoints) -> None:
    """The processor stands for a device."""
    directory, budget = checkpoints.converted("demo"), 64 << 20
    with swarm:
        swarm.load(directory, ram=budget)
        swarm.load(directory, ram=budget, device="cpu", vram=budget)  # nothing was kept on a device yet
        swarm.load(directory, ram=budget, device="cpu", vram=budget)
        swarm.load(directory, ram=budget, device="cpu")
        swarm.load(directory)
        with pytest.raises(ConfigError, match=rf"device='cpu' and vram={budget} already, not 'cpu' and 1024"):
            swarm.load(directory, ram=budget, device="cpu", vram=1024)
        opened = swarm._loaded(ConvertedDirectory(directory).model_id)
        with pytest.raises(ConfigError, match="not 'cuda:0' and None"):
            opened.check_device(SimpleNamespace(device="cuda:0"), None)  # type: ignore[arg-type]


def test_experts_that_nobody_announces_are_counted(swarm: Swarm, checkpoints: Checkpoints) -> None:
    directory = checkpoints.converted("demo")  # six layers of eight experts
    model_id = ConvertedDirectory(directory).model_id

    def holders(**announced: Any) -> Holders:
        peer = identity(1).peer
        return Holders({peer: Inventory(peer, model_id, issued=0, expires=1, **announced)})

    with swarm:
        swarm.load(directory)
        known = swarm._joined.directory(model_id)
        assert swarm.missing(model_id) == 48
        known.holders = holders(held=frozenset(ExpertKey(layer, 5) for layer in range(6)))
        assert swarm.missing(model_id) == 42
        known.holders = holders(held=frozenset(), complete=True)
        assert swarm.missing(model_id) == 0, "they can be fetched"


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # so says Python from 3.12 on
def test_a_fork_is_told_that_it_has_not_joined(swarm: Swarm, checkpoints: Checkpoints) -> None:
    with swarm:
        model, _ = swarm.load(checkpoints.converted("demo"))
        start_soon = backend_of(model)._start_soon
        child = os.fork()
        if child == 0:  # nothing of pytest may go on here
            os._exit(fork_refusals(swarm, start_soon))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def fork_refusals(swarm: Swarm, start_soon: Any) -> int:
    """How many of three ways to the event loop that it has not got are refused to a fork, or end at once."""
    faulthandler.dump_traceback_later(60, exit=True)  # rather than for ever
    refused = 0
    for ask in (lambda: swarm.holders(MODEL), lambda: start_soon(None)):
        try:
            ask()
        except ConfigError as error:
            refused += "forked" in str(error)
    swarm.__exit__(None, None, None)
    return refused + 1
