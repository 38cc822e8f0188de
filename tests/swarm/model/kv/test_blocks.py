"""Which block is in which tier: against lists of bytes, under any sequence of changes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from moehive.protocol.errors import DiskFull
from moehive.swarm.model.kv.blocks import BlockStore
from moehive.swarm.model.kv.memory import Account, BufferPool
from moehive.swarm.model.kv.plan import KvPlan

LAYERS, NBYTES = 3, 4
CPU = torch.device("cpu")
layers = st.integers(0, LAYERS - 1)


class Collected:
    """A Destination that keeps what it is given, as it is or by way of a buffer."""

    def __init__(self, count: int, *, directly: bool) -> None:
        self.content = [bytearray(NBYTES) for _ in range(count)]
        self._directly = directly

    def parts(self, count: int) -> list[memoryview] | None:
        return [memoryview(block) for block in self.content[:count]] if self._directly else None

    def put(self, first: int, blocks: Tensor) -> None:
        for index, block in enumerate(blocks, first):
            self.content[index][:] = bytes(block.tolist())


def make_store(resident: int, host: int, disk: int, window: int | None = None, transit: int = 1) -> BlockStore:
    """Room for so many blocks in each tier."""
    device = BufferPool(Account((resident + transit) * NBYTES), CPU)
    store = BlockStore(
        LAYERS, device, BufferPool(Account(host * NBYTES), CPU), Account(disk * NBYTES), Path(tempfile.gettempdir())
    )
    store.follow(KvPlan(slots=1, slot=0, resident=resident * NBYTES, window=window, transit=transit * NBYTES))
    return store


def append(store: BlockStore, layer: int, content: bytes) -> None:
    store.append(layer, NBYTES, lambda block: block.copy_(torch.tensor(list(content), dtype=torch.uint8)))  # type: ignore[arg-type,return-value]


def content_of(store: BlockStore, layer: int, *, directly: bool = True) -> list[bytes]:
    into = Collected(store.count(layer), directly=directly)
    store.load(layer, into)
    return [bytes(block) for block in into.content]


class Blocks(RuleBasedStateMachine):
    """Accounts refuse to exceed their limits, so that every run also shows that the budgets hold."""

    @initialize(
        resident=st.integers(0, 6),
        host=st.integers(0, 4),
        window=st.none() | st.integers(0, 2),
        transit=st.integers(1, 3),
        beside=st.booleans(),
    )
    def begin(self, resident: int, host: int, window: int | None, transit: int, beside: bool) -> None:
        """`beside`: as an accelerator has it, what comes from disk passes through the host tier's budget."""
        self.store = make_store(resident, host + transit * beside, 1000, window, transit)
        if beside:
            self.store._staging = self.store._host
        self.window = window
        self.wanted: list[list[bytes]] = [[] for _ in range(LAYERS)]
        self.made = 0

    @rule(layer=layers)
    def add(self, layer: int) -> None:
        self.made += 1
        self.wanted[layer].append(self.made.to_bytes(NBYTES, "little"))
        append(self.store, layer, self.wanted[layer][-1])

    @rule(layer=layers, count=st.integers(0, 8))
    def truncate(self, layer: int, count: int) -> None:
        self.store.truncate(layer, count)
        del self.wanted[layer][count:]

    @rule(layer=layers)
    def rewrite(self, layer: int) -> None:
        def pack(pair: tuple[Tensor, Tensor], block: Tensor) -> None:
            block.copy_(pair[0].flip(0))

        self.store.rewrite(layer, NBYTES, lambda block: (block.clone(), block), pack)
        self.wanted[layer] = [block[::-1] for block in self.wanted[layer]]

    @rule(resident=st.integers(0, 6), transit=st.integers(1, 3))
    def plan_anew(self, resident: int, transit: int) -> None:
        most = self.store._device.account.limit // NBYTES
        plan = KvPlan(0, 0, min(resident, most - 1) * NBYTES, self.window, min(transit, most) * NBYTES)
        if plan.resident + plan.transit <= self.store._device.account.limit:
            self.store.follow(plan)

    @rule(layer=layers, directly=st.booleans())
    def load(self, layer: int, directly: bool) -> None:
        assert content_of(self.store, layer, directly=directly) == self.wanted[layer]

    @rule(layer=layers, index=st.integers(0, 7))
    def look(self, layer: int, index: int) -> None:
        if index < len(self.wanted[layer]):
            seen: list[bytes] = []
            self.store.look_at(layer, index, lambda block: seen.append(bytes(block.tolist())))
            assert seen == [self.wanted[layer][index]]

    @invariant()
    def each_layer_has_its_blocks_oldest_lowest(self) -> None:
        if not hasattr(self, "store"):
            return
        for layer, shelf in enumerate(self.store._shelves):
            assert len(shelf) == self.store.count(layer) == len(self.wanted[layer])
            assert self.window is None or len(shelf.on_device) <= self.window

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for layer in range(LAYERS):
                self.store.truncate(layer, 0)
            assert self.store._disk.used == 0
            self.store.close()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(stateful_step_count=25)


def test_the_oldest_go_down_a_tier_evenly_over_the_layers() -> None:
    store = make_store(resident=3, host=3, disk=100)
    for number in range(4):
        for layer in range(LAYERS):
            append(store, layer, bytes([number, layer, 0, 0]))
    found = [(shelf.on_disk, len(shelf.in_host), len(shelf.on_device)) for shelf in store._shelves]
    assert found == [(2, 1, 1)] * LAYERS
    assert [bytes(shelf.on_device[0].tolist())[0] for shelf in store._shelves] == [3] * LAYERS
    assert (store.counts.spilled_blocks, store.counts.written_bytes) == (9, 6 * NBYTES)
    content_of(store, 0)
    assert store.counts.reloaded_bytes == 3 * NBYTES


@pytest.mark.parametrize(("host", "transit"), [(3, 2), (3, 9)])
def test_more_room_for_what_comes_from_disk_is_made_in_host_memory(host: int, transit: int) -> None:
    """Beside an accelerator, once a division of its memory lets more blocks be on their way at a time."""
    store = make_store(resident=0, host=host, disk=100)
    store._staging = store._host
    content = [bytes([number] * NBYTES) for number in range(6)]
    for block in content:
        append(store, 0, block)
    assert len(store._shelves[0].in_host) == host - 1
    store.follow(KvPlan(slots=1, slot=0, resident=0, window=None, transit=transit * NBYTES))
    assert content_of(store, 0, directly=False) == content
    append(store, 0, b"abcd")
    assert content_of(store, 0, directly=False) == [*content, b"abcd"]


def test_a_layer_that_fills_host_memory_is_rewritten_to_disk() -> None:
    store = make_store(resident=0, host=2, disk=100)
    content = [bytes([number, 0, 0, 9]) for number in range(4)]
    for block in content:
        append(store, 0, block)
    assert len(store._shelves[0].in_host) == 2

    def pack(pair: tuple[Tensor, Tensor], block: Tensor) -> None:
        block.copy_(pair[0].flip(0))

    store.rewrite(0, NBYTES, lambda block: (block.clone(), block), pack)
    assert content_of(store, 0) == [block[::-1] for block in content]


def test_a_disk_budget_that_is_full_says_so_and_loses_nothing() -> None:
    store = make_store(resident=1, host=0, disk=1)
    append(store, 0, b"abcd")
    append(store, 0, b"efgh")
    with pytest.raises(DiskFull, match="disk budget of 4 B is full"):
        append(store, 0, b"ijkl")
    assert content_of(store, 0) == [b"abcd", b"efgh", b"ijkl"]


def test_blocks_that_are_cut_off_give_back_their_disk() -> None:
    store = make_store(resident=0, host=0, disk=3)
    for content in (b"abcd", b"efgh", b"ijkl"):
        append(store, 0, content)
    store.truncate(0, 1)
    file = store._shelves[0].file
    assert file is not None
    assert os.fstat(file._fd or 0).st_size == NBYTES
    append(store, 0, b"mnop")
    append(store, 0, b"qrst")
    assert content_of(store, 0) == [b"abcd", b"mnop", b"qrst"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_gives_back_files() -> None:
    before = descriptors()
    store = make_store(resident=0, host=0, disk=10)
    append(store, 0, b"abcd")
    append(store, 2, b"abcd")
    assert descriptors() == before + 2
    for layer in range(LAYERS):
        store.truncate(layer, 0)
    store.close()
    assert descriptors() == before
