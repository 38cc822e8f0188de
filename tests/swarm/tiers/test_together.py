"""A tier in device memory over a host tier, used by real threads while loads fail, memory ends and guesses go wrong."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiers import DEADLINE, wait_until
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, MemoryExhausted, StorageError
from moehive.swarm.tiers.accelerator import TorchAccelerator
from moehive.swarm.tiers.device import DeviceTier
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier

SIZE = 8  # bytes of an entry, in both tiers
LAYERS, EXPERTS, CALLS, THREADS = 2, 6, 40, 3
Key = tuple[int, int]  # layer, expert
KEYS = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


class Machine:
    """Counts the bytes that are really alive, and which loads go on at once. Every so many loads one fails."""

    def __init__(self, error_every: int, exhausted_every: int) -> None:
        self.lock = threading.Lock()
        self.alive = self.peak = self.loads = 0
        self.loading: Counter[Key] = Counter()
        self.error_every, self.exhausted_every = error_every, exhausted_every

    def load(self, key: Key) -> Block:
        with self.lock:
            self.loads += 1
            self.loading[key] += 1
            assert self.loading[key] == 1, f"two loads of {key} at once"
            fails = self.error_every and self.loads % self.error_every == 0
            ends = self.exhausted_every and self.loads % self.exhausted_every == 0
        try:
            block = Block(self, key)
            if ends:
                raise MemoryError
            if fails:
                raise StorageError("a bad sector")
            return block
        finally:
            with self.lock:
                self.loading[key] -= 1


class Block:
    """What an entry of the host tier is."""

    def __init__(self, machine: Machine, key: Key) -> None:
        self.machine, self.key = machine, key
        with machine.lock:
            machine.alive += SIZE
            machine.peak = max(machine.peak, machine.alive)

    def __del__(self) -> None:
        with self.machine.lock:
            self.machine.alive -= SIZE


class Tiers:
    """Both tiers, each entry of the device's made of the host's."""

    def __init__(self, machine: Machine, host: int, slots: int) -> None:
        self.host_budget, self.device_budget = host * SIZE, slots * SIZE
        self.host: RamTier[Key, Block] = RamTier(
            self.host_budget, machine.load, room=lambda _: SIZE, size=lambda _: SIZE,
            policy=Lfru(lambda key: key, top_k=1), group=lambda key: key[0], wait=DEADLINE,
        )  # fmt: skip
        self.device: DeviceTier[Key] = DeviceTier(
            TorchAccelerator(torch.device("cpu")), self.device_budget, SIZE, self.pack, place=lambda key: key, top_k=1
        )

    def pack(self, key: Key, memory: Tensor) -> None:
        with self.host.lease(key) as block:
            memory.fill_(block.key[0] * EXPERTS + block.key[1])
            del block

    def call(self, layer: int, experts: list[int], tokens: int) -> None:
        """One call: uploads begin for some, the rest is computed from host memory."""
        keys = [(layer, expert) for expert in experts]
        missing = self.device.note(Uses(layer, dict.fromkeys(keys, 1), tokens))
        self.device.begin(layer, missing[:1])
        self.host.note(Uses(layer, dict.fromkeys(missing[1:], 1), tokens))
        for key in keys:
            if key in missing[1:]:
                with self.host.lease(key) as block:
                    assert block.key == key
                    assert key in set(self.host.keys()), "an entry in use left"
                    del block
            else:
                with self.device.lease(key) as slot:
                    assert set(slot.memory.tolist()) == {key[0] * EXPERTS + key[1]}
                    assert key in set(self.device.keys()), "an entry in use left"

    def work(self, seed: int) -> int:
        """Calls of one thread; how many were served."""
        random, served = Random(seed), 0
        for turn in range(CALLS):
            layer = turn % LAYERS
            self.host.prefetch(layer, [((layer, random.randrange(EXPERTS)), random.random())], most=1)
            try:
                self.call(layer, random.sample(range(EXPERTS), 2), 1)
            except (StorageError, MemoryExhausted):
                continue
            served += 1
        return served


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    host=st.integers(THREADS + 3, 8),
    slots=st.integers(THREADS + 3, 8),
    error_every=st.sampled_from([0, 3, 7]),
    exhausted_every=st.sampled_from([0, 5, 11]),
)
def test_budgets_hold_and_every_call_is_served_or_told_why(
    seed: int, host: int, slots: int, error_every: int, exhausted_every: int
) -> None:
    machine = Machine(error_every, exhausted_every)
    tiers = Tiers(machine, host, slots)
    with ThreadPoolExecutor(THREADS) as pool:
        served = [done.result(2 * DEADLINE) for done in [pool.submit(tiers.work, seed + n) for n in range(THREADS)]]
    wait_until(lambda: not tiers.host._flights and not tiers.device._tier._flights)
    if not error_every and not exhausted_every:
        assert served == [CALLS] * THREADS
    assert machine.peak <= tiers.host_budget
    assert tiers.device.allocated_bytes <= tiers.device_budget
    stats = tiers.host.stats
    assert (stats.shrinks > 0) == (tiers.host.budget_bytes < tiers.host_budget)
    assert stats.resident_bytes == machine.alive <= stats.budget_bytes
    assert stats.reserved_bytes == tiers.device.stats.reserved_bytes == 0
    assert stats.loads - stats.failed_loads == stats.entries + stats.evictions, "a joined load was made twice"
    machine.error_every = machine.exhausted_every = 0
    for layer, expert in KEYS:  # no failure of the past is in the way of anything
        tiers.call(layer, [expert], 1)
    tiers.device.close()
    tiers.host.close()


def test_both_tiers_with_room_for_one_serve_threads_that_want_all() -> None:
    tiers = Tiers(Machine(0, 0), 1, 1)

    def use(seed: int) -> None:
        random = Random(seed)
        for _ in range(CALLS):
            tiers.call(random.randrange(LAYERS), [random.randrange(EXPERTS)], 1)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(use, seed) for seed in range(THREADS)]:
            done.result(2 * DEADLINE)
    tiers.device.close()
    tiers.host.close()


def test_who_waits_for_a_load_that_fails_is_told_and_the_next_one_loads() -> None:
    machine = Machine(1, 0)
    tiers = Tiers(machine, 2, 2)
    barrier, errors = threading.Barrier(THREADS), list[str]()

    def use() -> None:
        barrier.wait(DEADLINE)
        try:
            with tiers.device.lease((0, 0)):
                pass
        except (StorageError, BudgetTooSmall) as error:
            errors.append(str(error))

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(use) for _ in range(THREADS)]:
            done.result(2 * DEADLINE)
    assert errors == ["a bad sector"] * THREADS
    machine.error_every = 0
    tiers.call(0, [0], 1)
    assert (tiers.host.stats.entries, tiers.device.stats.entries) == (1, 1)
    tiers.device.close()
    tiers.host.close()
