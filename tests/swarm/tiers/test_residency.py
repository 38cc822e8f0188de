"""Simulated threads, interleaved as Hypothesis likes: the rules hold whatever the order, under every policy."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moehive.swarm.tiers.baselines import Lfu
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Lru, Policy, Uses
from moehive.swarm.tiers.residency import Residency, Speculation, Use

KEYS = st.integers(0, 7)
SIZES = {key: 1 + key % 4 for key in range(8)}
POLICIES: dict[str, Callable[[], Policy[int]]] = {
    "lru": Lru,
    "lfu": Lfu,
    "lfru": lambda: Lfru(lambda key: (key % 2, key // 2), top_k=1),
}


@dataclass
class Load:
    key: int
    reserved: int
    speculation: Speculation | None = None


@dataclass
class Running:
    """A call: what it did not use yet, and its uses. Those of one call are a thread's."""

    left: list[int]
    uses: list[Use[int, str]] = field(default_factory=list)
    thread: int = 1


class ManyThreads(RuleBasedStateMachine):
    @initialize(budget=st.integers(1, 16), policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, budget: int, policy: str) -> None:
        self.held = Residency[int, str](budget, POLICIES[policy]())
        self.steps: list[Running] = []
        self.loads: dict[int, Load] = {}
        self.pinned: set[int] = set()
        self.uses = [0, 0]

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4, unique=True), want=st.booleans())
    def note(self, keys: list[int], want: bool) -> None:
        missing = self.held.note(Uses(keys[0] % 2, dict.fromkeys(keys, 1)), want=want)
        assert missing == [key for key in keys if key not in self.held.entries]
        self.uses[0] += len(keys) - len(missing)
        self.uses[1] += len(missing)
        self.steps.append(Running(list(keys)))

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4, unique=True))
    def hold(self, keys: list[int]) -> None:
        """A call that finds everything takes it in one step; another one changes nothing by trying."""
        thread = len(self.steps) + 1
        use = self.held.hold(keys[0] % 2, keys, thread)
        if use is not None:
            assert [entry.key for entry in use.entries if entry is not None] == keys
            self.uses[0] += len(keys)
            self.steps.append(Running([], [use], thread))
        elif set(keys) <= set(self.held.entries):
            assert self.held.speculation.pending or self.held._noted

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def end_at_once(self, data: st.DataObject) -> None:
        """Some thread was interrupted, in whatever it did: its uses end, and those of no other."""
        running = self.steps[data.draw(st.integers(0, len(self.steps) - 1))]
        self.steps = [step for step in self.steps if step.thread != running.thread]
        self.held.recover(running.thread, sum(load.reserved for load in self.loads.values()))

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def need(self, data: st.DataObject) -> None:
        """A call asks for what it uses next."""
        running = self.steps[data.draw(st.integers(0, len(self.steps) - 1))]
        if not running.left:
            return
        key = running.left[0]
        use = Use[int, str](running.thread)
        if self.held.acquire([key], use):
            running.uses.append(use)
            del running.left[0]
        elif key in self.loads:
            return  # it waits; end_load gives the entry to nobody, so a later turn acquires it
        else:
            before = set(self.held.entries), self.held.resident, self.held.reserved
            if self.held.reserve(key, SIZES[key]):
                self.loads[key] = Load(key, SIZES[key])
            else:
                assert (set(self.held.entries), self.held.resident, self.held.reserved) == before
                assert self.held.kept + SIZES[key] > self.held.budget, "there was room"

    @rule(key=KEYS, chance=st.floats(0, 1))
    def suspect(self, key: int, chance: float) -> None:
        self.held.want(key % 2, [key])
        if key in self.held.entries or key in self.loads:
            return
        if self.held.reserve_spare(key, SIZES[key], chance=chance):
            self.loads[key] = Load(key, SIZES[key], Speculation(0, SIZES[key]))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        load = self.loads.pop(data.draw(st.sampled_from(sorted(self.loads))))
        if fails:
            self.held.cancel(load.reserved)
            assert load.key not in self.held.entries
        else:
            self.held.publish(load.key, f"value {load.key}", load.reserved, (), load.speculation)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def end_step(self, data: st.DataObject) -> None:
        running = self.steps.pop(data.draw(st.integers(0, len(self.steps) - 1)))
        for use in [*running.uses, *running.uses[:1]]:  # once more changes nothing
            self.held.release(use)

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        used = key in self.in_use()
        may = key in self.held.entries and key not in self.pinned and not used
        assert self.held.evict(key) == may

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

    def in_use(self) -> set[int]:
        uses = [use for step in self.steps for use in step.uses]
        return {entry.key for use in uses for entry in use.entries if entry is not None}

    @invariant()
    def the_budget_holds(self) -> None:
        """Over it there is only what must stay; that can happen only after the budget was lowered."""
        used = self.held.resident + self.held.reserved
        assert used <= max(self.held.budget, self.held.kept)

    @invariant()
    def what_is_in_use_or_pinned_and_resident_stays(self) -> None:
        uses = [use for step in self.steps for use in step.uses]
        assert self.held.uses == set(uses)
        for entry in (entry for use in uses for entry in use.entries if entry is not None):
            assert self.held.entries[entry.key] is entry
            assert entry.value == f"value {entry.key}"
        assert self.held._kept_keys() == self.in_use() | self.pinned

    @invariant()
    def the_sums_are_right(self) -> None:
        assert self.held.sizes == {key: SIZES[key] for key in self.held.entries}
        assert self.held.resident == sum(self.held.sizes.values())
        assert self.held.reserved == sum(load.reserved for load in self.loads.values())
        assert not self.held.entries.keys() & self.loads.keys(), "a load that is not over left a trace"
        counts = self.held.groups.values()
        assert [sum(c.hits for c in counts), sum(c.misses for c in counts)] == self.uses
        speculation = self.held.speculation
        assert len(self.held.outcomes) == speculation.used + speculation.wasted
        assert speculation.pending == sum(entry.speculation is not None for entry in self.held.entries.values())


ManyThreads.TestCase.settings = settings(stateful_step_count=40)
TestManyThreads = ManyThreads.TestCase


def take(held: Residency[int, str], key: int, size: int) -> Use[int, str]:
    held.note(Uses(0, {key: 1}))
    assert held.reserve(key, size)
    use = Use[int, str](1)
    held.publish(key, "", size, [use])
    return use


def test_a_lowered_budget_takes_effect_when_entries_are_released() -> None:
    held = Residency[int, str](10, Lru())
    first, second = take(held, 1, 5), take(held, 2, 5)
    held.resize(5)
    assert held.resident == 10
    held.release(first)
    assert list(held.entries) == [2]
    held.release(second)
    assert list(held.entries) == [2]


def test_what_is_evicted_is_freed_at_once() -> None:
    held = Residency[int, str](10, Lru())
    use = take(held, 1, 1)
    (entry,) = use.entries
    held.release(use)
    assert held.evict(1)
    assert not hasattr(entry, "value"), "whoever still has the entry would keep its memory"


def test_a_release_too_many_ends_nobody_elses_use() -> None:
    held = Residency[int, str](10, Lru())
    first, second = take(held, 1, 1), Use[int, str](2)
    assert held.acquire([1], second)
    held.release(first)
    held.release(first)
    assert not held.evict(1)


@given(st.lists(st.sets(st.sampled_from(range(4)), min_size=1, max_size=2).map(sorted), max_size=300))
def test_of_calls_that_find_everything_the_policy_learns_before_it_decides(calls: list[list[int]]) -> None:
    held, told = Residency[int, str](4, Lru()), Lru[int]()
    for key in range(4):
        assert held.reserve(key, 1)
        held.publish(key, "", 1)
        told.loaded(key, 1)
    for keys in calls:
        use = held.hold(0, keys, 1)
        assert use is not None
        held.release(use)
        told.step(Uses(0, dict.fromkeys(keys, 1)))
    first = told.victims(None, 2, lambda _: False)
    held.resize(2)
    assert first is not None
    assert set(held.entries) == set(range(4)) - set(first)


@given(st.integers(0, 600))
def test_of_calls_that_find_everything_none_is_lost_from_the_counts(calls: int) -> None:
    held = Residency[int, str](1, Lru())
    assert held.reserve(0, 1)
    held.publish(0, "", 1)
    for _ in range(calls):
        assert held.hold(0, [0], 1) is not None
    assert [counts.steps for counts in held.groups.values()] == [calls] * bool(calls)
    assert held.counts(0).hits == held.counts(0).clean_steps == held.counts(0).steps == calls


def test_a_budget_lowered_while_a_load_is_under_way_holds_when_it_is_over() -> None:
    held = Residency[int, str](10, Lru())
    assert held.reserve(1, 5)
    held.resize(4)
    held.publish(1, "", 5)
    assert (held.resident, held.reserved) == (0, 0)


def test_what_is_pinned_leaves_a_lowered_budget_when_it_is_no_longer() -> None:
    held = Residency[int, str](10, Lru())
    held.pin(1)
    held.release(take(held, 1, 5))
    held.resize(4)
    assert list(held.entries) == [1]
    held.unpin(1)
    assert not held.entries


def test_whatever_an_interrupt_left_undone_is_derived_from_what_is_there() -> None:
    held = Residency[int, str](10, Lru())
    for key in (1, 2):
        held.release(take(held, key, 3))
    assert held.reserve_spare(3, 2)
    held.publish(3, "", 2, (), Speculation(0))
    held.want(0, [1])
    held.sizes, held.resident, held.reserved, held.speculation.pending = {1: 5, 4: 1}, 9, 7, 3
    held._wanted[2] = None
    held.policy.evicted(1)
    held.policy.loaded(4, 1)
    held.recover(1, 2)
    assert held.sizes == {1: 3, 2: 3, 3: 2}
    assert (held.resident, held.reserved, held.speculation.pending) == (8, 2, 1)
    assert list(held._wanted) == [1]
    assert held.policy.victims(None, 8, lambda _: False) == [2, 3, 1]


def test_what_a_layer_wants_takes_the_place_of_what_it_wanted_before() -> None:
    held = Residency[int, str](2, Lru())
    for key in (1, 2):
        held.release(take(held, key, 1))
    held.want(0, [1, 2])
    assert not held.reserve_spare(3, 1)
    held.want(0, [2])
    assert held.reserve_spare(3, 1)
    assert list(held.entries) == [2]
