"""Slots for whole layers, and the thread that fetches the next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moehive.protocol.errors import StorageError
from moehive.swarm.model.kv.memory import Account, BufferPool
from moehive.swarm.model.kv.workspace import Wanted, Workspace

NBYTES = 16


class Stored:
    """Fills a buffer with the layer's number; remembers who asked in which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[Wanted, bool]] = []  # what, and whether in the main thread
        self.fails = False

    def fill(self, wanted: Wanted, buffer: Tensor) -> None:
        self.calls.append((wanted, threading.current_thread() is threading.main_thread()))
        if self.fails:
            raise StorageError("the disk is gone")
        buffer.fill_(wanted.layer)


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """Two slots; any fill is worth a thread once there was one."""
    workspace = Workspace(BufferPool(Account(2 * NBYTES), torch.device("cpu")))
    workspace.worthwhile = 0.0
    workspace.resize(2, NBYTES)
    yield workspace
    workspace.close()


def wanted(layer: int, length: int = 5) -> Wanted:
    return Wanted(layer, length, length + 1)


def test_what_was_fetched_ahead_is_there(workspace: Workspace, stored: Stored) -> None:
    first = workspace.open(wanted(1), stored.fill)
    workspace.fetch_ahead(wanted(2), stored.fill)
    second = workspace.open(wanted(2), stored.fill)
    assert stored.calls == [(wanted(1), True), (wanted(2), False)]
    assert [int(first[0]), int(second[0])] == [1, 2]
    assert (workspace.times.expected, workspace.times.unexpected) == (1, 1)
    assert workspace.times.reload > 0


@pytest.mark.parametrize("other", [wanted(3), Wanted(2, 5, 7), Wanted(2, 4, 5)])
def test_what_is_not_expected_is_put_together_anew(workspace: Workspace, stored: Stored, other: Wanted) -> None:
    workspace.open(wanted(1), stored.fill)
    workspace.fetch_ahead(wanted(2), stored.fill)
    assert int(workspace.open(other, stored.fill)[0]) == other.layer
    assert workspace.times.expected == 0
    assert len(stored.calls) == 3


def test_what_changed_since_is_put_together_anew(workspace: Workspace, stored: Stored) -> None:
    workspace.open(wanted(1), stored.fill)
    workspace.fetch_ahead(wanted(2), stored.fill)
    workspace.forget(2)
    workspace.open(wanted(2), stored.fill)
    assert workspace.times.expected == 0
    workspace.fetch_ahead(wanted(1), stored.fill)
    workspace.forget(2)
    workspace.open(wanted(1), stored.fill)
    assert workspace.times.expected == 1


def test_the_slot_that_is_read_is_left_alone(workspace: Workspace, stored: Stored) -> None:
    for layer in range(1, 6):
        buffer = workspace.open(wanted(layer), stored.fill)
        workspace.fetch_ahead(wanted(layer + 1), stored.fill)
        workspace.settle()
        assert int(buffer[0]) == layer


def test_a_fetch_that_failed_is_tried_again_by_who_needs_it(workspace: Workspace, stored: Stored) -> None:
    workspace.open(wanted(1), stored.fill)
    stored.fails = True
    workspace.fetch_ahead(wanted(2), stored.fill)
    workspace.settle()
    with pytest.raises(StorageError):
        workspace.open(wanted(2), stored.fill)
    stored.fails = False
    assert int(workspace.open(wanted(2), stored.fill)[0]) == 2


def test_a_slot_that_was_filled_in_vain_holds_nothing(workspace: Workspace, stored: Stored) -> None:
    workspace.open(wanted(1), stored.fill)
    workspace.fetch_ahead(wanted(2), stored.fill)
    workspace.settle()
    stored.fails = True
    with pytest.raises(StorageError):
        workspace.open(wanted(3), stored.fill)  # into the slot where 2 was
    stored.fails = False
    workspace.open(wanted(2), stored.fill)
    assert workspace.times.expected == 0


def test_it_looks_ahead_with_a_second_slot_and_where_fetching_takes_long(stored: Stored) -> None:
    workspace = Workspace(BufferPool(Account(2 * NBYTES), torch.device("cpu")))
    workspace.resize(2, NBYTES)
    workspace.open(wanted(1), stored.fill)
    workspace.worthwhile = 1e6
    assert not workspace.looks_ahead
    workspace.worthwhile = 0.0
    assert workspace.looks_ahead
    workspace.resize(1, NBYTES)
    assert not workspace.looks_ahead


def test_one_slot_serves_any_number_of_layers_and_sizes_are_counted(stored: Stored) -> None:
    account = Account(100)
    workspace = Workspace(BufferPool(account, torch.device("cpu")))
    workspace.resize(1, 10)
    assert [int(workspace.open(wanted(layer), stored.fill)[0]) for layer in range(4)] == [0, 1, 2, 3]
    assert account.used == 10
    workspace.resize(1, 90)  # not beside the old one
    workspace.open(wanted(0), stored.fill)
    assert (account.used, account.peak) == (90, 90)
    workspace.close()
    assert account.used == 0


def test_nothing_is_put_together_for_a_layer_without_tokens(workspace: Workspace, stored: Stored) -> None:
    workspace.open(wanted(1, length=0), stored.fill)
    assert stored.calls == []
    assert workspace.times.unexpected == 0


def test_closing_ends_the_thread(stored: Stored) -> None:
    workspace = Workspace(BufferPool(Account(2 * NBYTES), torch.device("cpu")))
    workspace.worthwhile = 0.0
    workspace.resize(2, NBYTES)
    workspace.open(wanted(1), stored.fill)
    workspace.fetch_ahead(wanted(2), stored.fill)
    workspace.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moehive-kv")]
