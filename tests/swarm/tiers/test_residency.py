"""Simulated threads, interleaved as Hypothesis likes: the rules hold whatever the order."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moehive.swarm.tiers.policy import Lru
from moehive.swarm.tiers.residency import Entry, Residency

KEYS = st.integers(0, 7)
SIZES = {key: 1 + key % 4 for key in range(8)}


@dataclass
class Load:
    key: int
    reserved: int
    users: int = 1


class ManyThreads(RuleBasedStateMachine):
    @initialize(budget=st.integers(1, 16))
    def begin(self, budget: int) -> None:
        self.held = Residency[int, str](budget, Lru(), group=lambda key: key % 2)
        self.leases: list[Entry[int, str]] = []
        self.loads: dict[int, Load] = {}
        self.pinned: set[int] = set()
        self.shrunk = False  # a budget was lowered, or a hint too small: over it until enough is released
        self.uses = [0, 0]

    @rule(key=KEYS, hint=st.booleans())
    def lease(self, key: int, hint: bool) -> None:
        resident = key in self.held.entries
        entry = self.held.acquire(key)
        assert (entry is not None) == resident
        if entry is not None:
            self.uses[0] += 1
            self.leases.append(entry)
        elif key in self.loads:
            self.held.missed(key)
            self.uses[1] += 1
            self.loads[key].users += 1
        else:
            before = set(self.held.entries), self.held.resident, self.held.reserved
            size = SIZES[key] if hint else 0
            if self.held.reserve(key, size):
                self.held.missed(key)
                self.uses[1] += 1
                self.loads[key] = Load(key, size)
            else:
                assert (set(self.held.entries), self.held.resident, self.held.reserved) == before
                assert self.held.kept + size > self.held.budget, "there was room"

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        load = self.loads[data.draw(st.sampled_from(sorted(self.loads)))]
        size = SIZES[load.key]
        if not fails and not self.held.reserve(load.key, size - load.reserved):
            return  # it waits for room
        if fails:
            self.held.cancel(load.reserved)
            assert load.key not in self.held.entries
        else:
            entry = self.held.publish(load.key, f"value {load.key}", size, load.users)
            self.leases += [entry] * load.users
        del self.loads[load.key]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert self.held.release(entry) == (entry not in self.leases)

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        may = key in self.held.entries and key not in self.pinned and all(e.key != key for e in self.leases)
        assert self.held.evict(key) == may
        assert (key in self.held.entries) <= (not may)

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        self.held.pin(key)
        self.pinned.add(key)

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        self.held.unpin(key)
        self.pinned.discard(key)

    @rule(budget=st.integers(1, 16))
    def resize(self, budget: int) -> None:
        self.held.resize(budget)

    @invariant()
    def the_budget_holds(self) -> None:
        """Over it there is only what must stay; that can happen only after the budget was lowered."""
        used = self.held.resident + self.held.reserved
        assert used <= max(self.held.budget, self.held.kept)

    @invariant()
    def what_is_in_use_or_pinned_and_resident_stays(self) -> None:
        for entry in self.leases:
            assert self.held.entries[entry.key] is entry
            assert entry.value == f"value {entry.key}"
        assert {fact.key: fact.in_use for fact in self.held.facts() if fact.in_use} == {
            key: sum(entry.key == key for entry in self.leases) for key in {entry.key for entry in self.leases}
        }

    @invariant()
    def the_sums_are_right(self) -> None:
        assert self.held.resident == sum(SIZES[key] for key in self.held.entries)
        assert self.held.reserved == sum(load.reserved for load in self.loads.values())
        assert not self.held.entries.keys() & self.loads.keys(), "a load that is not over left a trace"
        counts = self.held.groups.values()
        assert [sum(c.hits for c in counts), sum(c.misses for c in counts)] == self.uses


ManyThreads.TestCase.settings = settings(stateful_step_count=40)
TestManyThreads = ManyThreads.TestCase


def test_without_orders_the_budget_is_never_exceeded() -> None:
    held = Residency[int, str](10, Lru())
    assert held.reserve(1, 6)
    assert not held.reserve(2, 5)
    entry = held.publish(1, "one", 6, 1)
    assert not held.reserve(2, 5)
    held.release(entry)
    assert held.reserve(2, 5)
    assert list(held.entries) == []


def test_a_lowered_budget_takes_effect_when_entries_are_released() -> None:
    held = Residency[int, str](10, Lru())
    for key in (1, 2):
        held.reserve(key, 5)
    first, second = (held.publish(key, "", 5, 1) for key in (1, 2))
    held.resize(5)
    assert held.resident == 10
    held.release(first)
    assert list(held.entries) == [2]
    held.release(second)
    assert list(held.entries) == [2]


def test_what_is_evicted_is_freed_at_once() -> None:
    held = Residency[int, list[int]](10, Lru())
    held.reserve(1, 1)
    entry = held.publish(1, [], 1, 1)
    held.release(entry)
    assert held.evict(1)
    assert not hasattr(entry, "value"), "whoever still has the entry would keep its memory"


def test_a_release_too_many_is_our_bug() -> None:
    held = Residency[int, str](10, Lru())
    held.reserve(1, 1)
    entry = held.publish(1, "", 1, 1)
    held.release(entry)
    with pytest.raises(AssertionError, match="released more often"):
        held.release(entry)
