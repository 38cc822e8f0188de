"""The tier in device memory, on a device that runs behind: computing waits for copies, slots wait for computing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fake_accelerator import DEADLINE, FakeAccelerator, FakeEvent
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, MemoryExhausted
from moehive.swarm.tiers import device
from moehive.swarm.tiers.accelerator import TorchAccelerator
from moehive.swarm.tiers.device import DeviceTier, Slot, SlotPool
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.staging import Staging, StagingBuffers

SLOT = 8  # bytes
Key = tuple[int, int]  # layer, expert
KEYS = st.tuples(st.integers(0, 1), st.integers(0, 3))


def content(key: Key) -> Tensor:
    return torch.full((SLOT,), 1 + 10 * key[0] + key[1], dtype=torch.uint8)


class Made:
    """A tier on a fake device, and what it packed."""

    def __init__(self, slots: int, *, limit: int | None = None, loaders: int = 2, top_k: int = 1) -> None:
        self.accelerator = FakeAccelerator(SLOT * (slots if limit is None else limit))
        self.packed: Counter[Key] = Counter()
        self.budget = slots * SLOT
        self.tier: DeviceTier[Key] = DeviceTier(
            self.accelerator, self.budget, SLOT, self.pack, place=lambda key: key, top_k=top_k, loaders=loaders
        )

    def pack(self, key: Key, memory: Tensor) -> None:
        self.packed[key] += 1
        memory.copy_(content(key))

    def use(self, key: Key) -> None:
        """One call that computes with one entry: on the device, some time."""
        self.tier.note(Uses(key[0], {key: 1}))
        with self.tier.lease(key) as slot:
            self.accelerator.enqueue(lambda: check(key, slot))

    def begin(self, *keys: Key) -> None:
        """Begin uploads on loader threads, and wait until the copies are ordered, or have failed."""
        self.tier.begin(keys[0][0], keys)
        self.accelerator.until(lambda: not self.tier._tier._flights)

    def close(self) -> None:
        """While the device goes on."""
        closing = threading.Thread(target=self.tier.close)
        closing.start()
        while closing.is_alive():
            self.accelerator.finish()
            closing.join(0.001)
        self.accelerator.finish()


def check(key: Key, slot: Slot) -> None:
    assert torch.equal(slot.memory, content(key)), f"what computes with {key} found {slot.memory.tolist()}"


# --- the device runs behind -------------------------------------------------------------------------------------------


def test_what_computes_waits_on_the_device_for_the_copy() -> None:
    made = Made(2)
    made.begin((0, 0))
    made.use((0, 0))  # does not block, though nothing was copied
    assert not made.accelerator.advance(copies=False), "a kernel ran before the bytes were there"
    made.accelerator.finish()
    assert made.accelerator.idle
    assert made.packed == {(0, 0): 1}
    made.close()


def test_a_slot_is_not_written_before_what_reads_it_is_done() -> None:
    made = Made(1)
    made.begin((0, 0))
    made.use((0, 0))
    while made.accelerator.advance(copies=True):
        pass
    made.begin((0, 1))  # the lease has ended, the kernel has not run
    assert not made.accelerator.advance(copies=True), "the copy did not wait for the kernel"
    made.accelerator.finish()
    made.use((0, 1))
    made.close()
    assert made.tier.stats.evictions == 1


def test_staging_memory_is_not_written_before_its_copy_is_over() -> None:
    made = Made(4)
    made.begin((0, 0), (0, 1))
    made.accelerator.finish()
    made.accelerator.until(lambda: len(free_staging(made)) == 3)
    for key in ((0, 0), (0, 1), (0, 2), (0, 3)):  # the last two in this thread, which has to wait for each
        made.use(key)
    made.close()
    assert len([one for one in free_staging(made) if one.memory is not None]) == 2, "more than loaded at once"


def free_staging(made: Made) -> list[Staging]:
    return [one for one in made.tier._staging.buffers if not one.thread]


def test_uploads_never_take_more_staging_memory_than_was_said() -> None:
    """Of five threads that upload, all but three wait."""
    made, going, go_on = Made(8), threading.Semaphore(0), threading.Event()
    pack = made.tier._pack

    def held_up(key: Key, memory: Tensor) -> None:
        going.release()
        assert go_on.wait(DEADLINE)
        pack(key, memory)

    made.tier._pack = held_up
    threads = [threading.Thread(target=made.use, args=((layer, number),)) for layer in (0, 1) for number in (0, 1)]
    made.tier.begin(0, [(0, 3)])
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert going.acquire(timeout=DEADLINE)
    made.accelerator.until(lambda: len(made.tier._tier._flights) == 5)
    assert free_staging(made) == []
    assert not going.acquire(blocking=False)
    go_on.set()
    while any(thread.is_alive() for thread in threads):
        made.accelerator.finish()
        threads[0].join(0.001)
    made.close()
    assert set(made.packed.values()) == {1}
    assert made.tier.staging_bytes == 3 * SLOT
    assert made.accelerator.staged == 3 * SLOT


def test_what_a_thread_had_that_was_interrupted_is_used_again_after_its_copy() -> None:
    accelerator = FakeAccelerator()
    buffers = StagingBuffers(accelerator, SLOT, 1)
    buffer, memory = buffers.take()
    slot = accelerator.allocate(SLOT)
    memory.copy_(content((0, 1)))
    buffer.copied = accelerator.copy(slot, memory, ())
    buffers.recover(threading.get_ident() + 1)
    assert buffer.thread
    buffers.recover(threading.get_ident())
    assert buffers.take()[1] is memory
    assert torch.equal(slot, content((0, 1))), "it would be written over before it was read"


def test_the_time_of_an_upload_is_that_until_its_bytes_are_there() -> None:
    made = Made(2)
    made.begin((0, 0))
    made.use((0, 0))
    assert made.tier.upload_seconds == 0.0
    assert made.tier.stats.total.loads.count == 0
    made.accelerator.finish()
    made.tier.close()
    assert made.tier.upload_seconds > 0
    assert made.tier.stats.total.loads.count == 1
    assert made.tier.stats.loaded_bytes == SLOT


# --- room -------------------------------------------------------------------------------------------------------------


def test_memory_is_taken_when_it_is_needed_and_never_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SLAB", 2 * SLOT)
    made = Made(3, loaders=0)
    for key, allocated in (((0, 0), 2), ((0, 1), 2), ((0, 2), 3), ((0, 3), 3)):
        made.use(key)
        assert made.accelerator.allocated == made.tier.allocated_bytes == allocated * SLOT
    made.close()


def test_where_the_device_has_less_the_budget_shrinks_and_the_load_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "SLAB", SLOT)
    made = Made(6, limit=3, loaders=0)
    for expert in range(4):
        made.use((0, expert))
    made.close()
    stats = made.tier.stats
    assert (stats.shrinks, made.accelerator.refused, stats.failed_loads) == (1, 2, 0)
    assert stats.resident_bytes == stats.budget_bytes == made.accelerator.allocated == 3 * SLOT


def test_a_device_without_any_memory_says_so() -> None:
    made = Made(2, limit=0, loaders=0)
    with pytest.raises(MemoryExhausted, match="VRAM tier"):
        made.use((0, 0))
    assert made.tier.stats.reserved_bytes == 0
    made.accelerator.limit = 2 * SLOT  # somebody else gave it back
    made.tier._tier.resize(made.budget)
    made.use((0, 0))
    made.close()


def test_a_failed_pack_leaves_its_slot_to_others() -> None:
    made = Made(1, loaders=0)
    made.use((0, 2))
    assert len(free_staging(made)) == 1

    def fail(key: Key, memory: Tensor) -> None:
        raise OSError("the disk is gone")

    pack, made.tier._pack = made.tier._pack, fail
    with pytest.raises(OSError, match="the disk is gone"):
        made.use((0, 0))
    made.tier._pack = pack
    made.use((0, 1))
    made.close()
    assert len(free_staging(made)) == 1
    assert made.accelerator.staged == SLOT


def test_uploads_leave_what_the_running_call_uses() -> None:
    made = Made(2)
    for key in ((0, 0), (0, 1)):
        made.use(key)
    made.accelerator.finish()
    assert made.tier.note(Uses(0, {(0, 0): 1, (0, 1): 1, (0, 2): 1})) == [(0, 2)]
    assert made.tier.begin(0, [(0, 2)]) == []
    with made.tier.lease((0, 0)):
        pass
    assert made.tier.begin(0, [(0, 2)]) == [(0, 2)], "what was used may leave"
    made.close()


def test_one_hot_layer_leaves_each_layer_its_floor() -> None:
    made = Made(6, loaders=0, top_k=1)  # two layers, whose floors are two slots each
    for layer in (0, 1):
        for expert in (0, 1):
            made.use((layer, expert))
    for turn in range(40):
        made.use((0, turn % 4))
    made.use((1, 0))
    made.use((1, 1))
    made.close()
    assert made.packed[1, 0] == made.packed[1, 1] == 1


def test_a_call_takes_two_slots_of_other_layers_at_most() -> None:
    """A prompt uses nearly all experts of a layer once, and would flush what decoding uses."""
    made = Made(8, loaders=0, top_k=1)
    for key in [(1, expert) for expert in range(6)] + [(0, 0), (0, 1)]:
        made.use(key)
    for _ in range(50):  # what is on the device of layer 1 is worth nothing any more, of layer 0 it is
        made.tier.note(Uses(1, {(1, 9): 1}))
        made.tier.note(Uses(0, {(0, 0): 1, (0, 1): 1}))
    newcomers = [(0, expert) for expert in range(2, 6)]
    made.tier.note(Uses(0, dict.fromkeys(newcomers, 1)))
    for key in newcomers:
        with made.tier.lease(key):
            pass
    left = made.tier.keys()
    assert sum(layer == 1 for layer, _ in left) == 6 - 2
    made.close()


def test_a_slot_remembers_every_read_that_is_not_over() -> None:
    """Several streams may compute: the end of one says nothing of the others."""
    accelerator = FakeAccelerator()
    slot, events = Slot(0, accelerator.allocate(SLOT)), [accelerator.record() for _ in range(3)]
    slot.read(events[0])
    events[0].done = True
    for event in events[1:]:
        slot.read(event)
    assert list(slot.reads) == events[1:]


def test_everything_in_use_is_said_with_the_budget_that_would_do() -> None:
    made = Made(1, loaders=0)
    made.tier._tier._wait = 0.0
    made.tier.note(Uses(0, {(0, 0): 1, (0, 1): 1}))
    with made.tier.lease((0, 0)), pytest.raises(BudgetTooSmall) as caught:
        made.use((0, 1))
    assert caught.value.needed == 2 * SLOT
    made.close()


# --- anything, in any order -------------------------------------------------------------------------------------------


class Device(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 6), limit=st.integers(1, 6))
    def make(self, slots: int, limit: int) -> None:
        self.made = Made(slots, limit=limit)
        self.less = limit < slots  # than the budget: what finds no memory is somebody else's to compute
        self.used: list[Key] = []
        self.ran: list[Key] = []

    def teardown(self) -> None:
        if not hasattr(self, "made"):
            return
        self.made.close()
        assert self.made.accelerator.idle, "something that was asked for never came"
        assert self.ran == self.used
        stats = self.made.tier.stats
        assert stats.loads - stats.failed_loads == sum(self.made.packed.values()), "a joined load was made twice"
        assert stats.loaded_bytes == SLOT * sum(self.made.packed.values())

    @rule(key=KEYS)
    def use(self, key: Key) -> None:
        before, missing = self.made.packed[key], self.made.tier.note(Uses(key[0], {key: 1}))
        with (
            suppress(MemoryExhausted, BudgetTooSmall) if self.less else nullcontext(),
            self.made.tier.lease(key) as slot,
        ):
            self.used.append(key)
            self.made.accelerator.enqueue(lambda: self.run_kernel(key, slot))
        assert self.made.packed[key] <= before + len(missing)

    def run_kernel(self, key: Key, slot: Slot) -> None:
        check(key, slot)
        self.ran.append(key)

    @precondition(lambda self: self.made.accelerator.unfinished < 2)  # else no thread is there to load
    @rule(key=KEYS)
    def upload(self, key: Key) -> None:
        self.made.begin(key)

    @rule(steps=st.integers(1, 4), copies=st.booleans())
    def advance(self, steps: int, copies: bool) -> None:
        for _ in range(steps):
            self.made.accelerator.advance(copies=copies)

    @rule(key=KEYS)
    def hold(self, key: Key) -> None:
        """A lease that lasts while another entry is asked for, with as little as one slot."""
        lease = self.made.tier.try_lease(key)
        if lease is not None:
            with lease as slot:
                if self.made.accelerator.unfinished < 2:
                    self.made.begin((key[0], (key[1] + 1) % 4))
                self.used.append(key)
                self.made.accelerator.enqueue(lambda: self.run_kernel(key, slot))

    @precondition(lambda self: hasattr(self, "made"))
    @invariant()
    def the_budget_holds(self) -> None:
        stats = self.made.tier.stats
        assert self.made.tier.allocated_bytes <= self.made.budget
        assert stats.resident_bytes + stats.reserved_bytes <= self.made.budget
        assert self.made.accelerator.allocated <= self.made.accelerator.limit


Device.TestCase.settings = settings(stateful_step_count=25, max_examples=30)
TestDevice = Device.TestCase


# --- what fails -------------------------------------------------------------------------------------------------------


class Failing(FakeAccelerator):
    """Host memory, or the device's queue, that is not there for a while."""

    fails = ""

    def staging(self, nbytes: int) -> Tensor:
        if self.fails == "staging":
            raise RuntimeError("no page-locked memory")
        return super().staging(nbytes)

    def copy(self, target: Tensor, source: Tensor, after: Sequence[FakeEvent]) -> FakeEvent:  # type: ignore[override]
        if self.fails == "copy":
            raise RuntimeError("the copy could not be ordered")
        return super().copy(target, source, after)


@pytest.mark.parametrize("what", ["staging", "copy"])
def test_an_upload_that_fails_gives_everything_back(what: str) -> None:
    made, accelerator = Made(1), Failing(SLOT)
    made.tier._accelerator = made.tier._pool._accelerator = made.accelerator = accelerator
    made.tier._staging._accelerator = accelerator
    if what == "copy":
        made.begin((0, 0))
        made.use((0, 0))  # its kernel has not run when the slot is wanted again
    accelerator.fails = what
    with pytest.raises(RuntimeError, match=r"memory|ordered"), made.tier.lease((0, 1)):
        pass
    accelerator.fails = ""
    made.begin((0, 1))
    made.use((0, 1))
    made.close()
    assert accelerator.idle
    assert accelerator.allocated == SLOT
    assert len(free_staging(made)) == 3


def test_a_slot_that_an_interrupt_lost_comes_back() -> None:
    made = Made(1, loaders=0)
    made.tier._pool.take((0, 3))
    made.tier.abandon(KeyboardInterrupt())
    made.use((0, 0))
    made.close()


def test_slots_that_others_use_or_load_into_are_not_lost() -> None:
    pool = SlotPool(FakeAccelerator(), SLOT, 3)
    used, loading, lost = (pool.take(key) for key in "abc")
    pool.recover({used}, ["b"])
    assert pool._free == [lost]
    pool.give(loading)  # its load has failed, and is not over yet
    pool.recover({used}, ["b"])
    assert set(pool._free) == {loading, lost}


# --- the real one, as far as it goes without a GPU --------------------------------------------------------------------


def test_torchs_streams_on_the_processor() -> None:
    accelerator = TorchAccelerator(torch.device("cpu"))
    tier: DeviceTier[Key] = DeviceTier(
        accelerator, 3 * SLOT, SLOT, lambda key, memory: memory.copy_(content(key)), place=lambda key: key, top_k=1
    )
    with torch.inference_mode():  # memory is shared with threads that are not in this mode
        for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (1, 3)]:
            tier.note(Uses(key[0], {key: 1}))
            tier.begin(key[0], [key, (key[0], 2)])
            with tier.lease(key) as slot:
                check(key, slot)
    tier.close()


def test_slots_have_equal_sizes_and_their_own_memory() -> None:
    pool = SlotPool(FakeAccelerator(), SLOT, 5)
    slots = [pool.take(None) for _ in range(5)]
    assert sorted(slot.index for slot in slots) == [0, 1, 2, 3, 4]
    addresses = {slot.memory.data_ptr() for slot in slots}
    assert max(addresses) - min(addresses) == 4 * SLOT
    assert all(slot.memory.shape == (SLOT,) for slot in slots)
