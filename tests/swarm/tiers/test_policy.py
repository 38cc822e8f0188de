"""Policies against their definitions, the traps of caching layers, and a real tier against the replay of its trace."""

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.baselines import Belady, Lfu
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Lru, Policy, Uses, choose_victims
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.replay import Replay, replay

Steps = Sequence[Uses[ExpertKey]]


def lfru(top_k: int = 2) -> Lfru[ExpertKey]:
    return Lfru(lambda key: (key.layer, key.expert), top_k=top_k)


def never(_: object) -> bool:
    return False


def one(_: object) -> int:
    return 1


def step(layer: int, *experts: int, tokens: int = 1) -> Uses[ExpertKey]:
    return Uses(layer, {ExpertKey(layer, expert): 1 for expert in experts}, tokens)


def run(policy: Policy[ExpertKey], steps: Steps, slots: int) -> Replay:
    return replay(policy, steps, one, slots)


STEPS = st.lists(
    st.builds(
        lambda layer, experts: step(layer, *experts),
        st.integers(0, 2),
        st.lists(st.integers(0, 4), min_size=1, max_size=2, unique=True),
    ),
    max_size=40,
)
SINGLE = st.lists(st.integers(0, 9), max_size=60)


# --- definitions ------------------------------------------------------------------------------------------------------


def test_lru_lets_the_oldest_leave_first_and_a_use_makes_young() -> None:
    lru = Lru[int]()
    for key in range(4):
        lru.loaded(key, 10)
    lru.step(Uses(0, {0: 1}))
    assert lru.victims(9, 15, never) == [1, 2]
    assert lru.victims(9, 15, lambda key: key == 1) == [2, 3]
    assert lru.victims(9, 40, never) == [1, 2, 3, 0]
    assert lru.victims(9, 41, never) is None
    assert lru.victims(9, 0, never) == []


@given(SINGLE, st.integers(1, 10))
def test_lru_keeps_the_latest_distinct_ones(trace: Sequence[int], slots: int) -> None:
    """Against the definition: a use hits if fewer than `slots` other keys were used since the last use of its key."""
    hits = 0
    for now, key in enumerate(trace):
        before = [i for i in range(now) if trace[i] == key]
        hits += bool(before) and len(set(trace[before[-1] + 1 : now])) < slots
    result = replay(Lru[int](), [Uses(0, {key: 1}) for key in trace], one, slots)
    assert (result.hits, result.misses) == (hits, len(trace) - hits)


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(1, 3))
def test_nothing_hits_more_often_than_belady(trace: Sequence[int], slots: int) -> None:
    """Against the best of all choices that can be made, by trying them."""

    def best(resident: frozenset[int], at: int) -> int:
        if at == len(trace):
            return 0
        if trace[at] in resident:
            return 1 + best(resident, at + 1)
        if len(resident) < slots:
            return best(resident | {trace[at]}, at + 1)
        return max(best(resident - {victim} | {trace[at]}, at + 1) for victim in resident)

    uses = [Uses(0, {key: 1}) for key in trace]
    assert replay(Belady(uses), uses, one, slots).hits == best(frozenset(), 0)


def test_lfu_keeps_what_was_used_most() -> None:
    uses = [Uses(0, {key: 1}) for key in (1, 1, 2, 3, 1, 2)]
    result = replay(Lfu[int](), uses, one, 2)
    assert (result.hits, result.evictions) == (2, 2), "2 was evicted for 3, not 1"


@given(STEPS, st.integers(1, 8), st.sampled_from([Lru, Lfu, lfru]))
def test_a_replay_is_repeatable_and_counts_every_use(
    steps: Steps, slots: int, make: Callable[[], Policy[ExpertKey]]
) -> None:
    first, second = run(make(), steps, slots), run(make(), steps, slots)
    assert first == second
    assert first.hits + first.misses == sum(len(uses.rows) for uses in steps)
    assert first.clean_steps <= first.steps == len(steps)


@given(STEPS, st.integers(2, 8), st.sampled_from([Lru, Lfu, lfru]))
def test_a_tier_decides_as_the_replay_of_its_trace(
    steps: Steps, slots: int, make: Callable[[], Policy[ExpertKey]]
) -> None:
    tier = RamTier[ExpertKey, ExpertKey](
        slots, lambda key: key, room=one, size=one, policy=make(), group=lambda key: key.layer, loaders=0
    )
    for uses in steps:
        tier.note(uses)
        for key in uses.rows:
            with tier.lease(key) as value:
                assert value == key
    counts, replayed = tier.stats.total, run(make(), steps, slots)
    assert counts.loads.count == replayed.misses
    assert tier.stats.evictions == replayed.evictions
    assert counts.steps == replayed.steps


# --- decisions --------------------------------------------------------------------------------------------------------


@given(STEPS, st.sets(st.integers(0, 4)), st.integers(0, 16), st.none() | st.floats(0, 1))
def test_victims_free_enough_spare_what_must_stay_and_change_nothing(
    steps: Steps, kept: set[int], need: int, chance: float | None
) -> None:
    policy, sizes = lfru(), {}
    for uses in steps:
        policy.step(uses)
        for key in uses.rows:
            if key not in sizes:
                sizes[key] = 1 + key.expert % 3
                policy.loaded(key, sizes[key])

    def keep(key: ExpertKey) -> bool:
        return key.expert in kept

    incoming = ExpertKey(1, 9)
    victims = policy.victims(incoming, need, keep, chance=chance)
    again = policy.victims(incoming, need, keep, chance=chance)
    assert victims == again
    free = sum(size for key, size in sizes.items() if not keep(key))
    if victims is None:
        assert chance is not None or free < need
    else:
        assert len(set(victims)) == len(victims)
        assert all(key in sizes and not keep(key) for key in victims)
        assert sum(sizes[key] for key in victims) >= need
        assert need <= 0 or sum(sizes[key] for key in victims[:-1]) < need, "one more than needed"


def test_no_layer_starves_another() -> None:
    """Where every layer can have top_k + 1 slots, a layer that uses ever new experts takes none of them."""
    steps = [step(0, 0, 1), step(1, 0, 1)] * 3 + [step(0, expert, expert + 1) for expert in range(2, 60)]
    policy = lfru()
    replay(policy, steps, one, 6)
    assert {key for key in resident(policy) if key.layer == 1} == {ExpertKey(1, 0), ExpertKey(1, 1)}


def with_an_idle_layer(policy: Lfru[ExpertKey], busy: int, idle: int) -> Lfru[ExpertKey]:
    """So many experts of layer 0, which are used all the time, and of layer 1, which are not used any more."""
    for _ in range(3):
        policy.step(step(0, *range(busy)))
    policy.step(step(1, *range(idle)))
    for _ in range(99):
        policy.step(step(1, 9))
    for layer, experts in ((0, busy), (1, idle)):
        for expert in range(experts):
            policy.loaded(ExpertKey(layer, expert), 1)
    return policy


@pytest.mark.parametrize(
    ("top_k", "idle", "leaves"),
    [
        (2, 4, 1),  # one more than top_k + 1: it is worth less than anything of layer 0
        (2, 3, 0),
        (4, 4, 0),  # too few slots for that: equal shares
        (4, 5, 1),
    ],
)
def test_the_floor_of_a_layer_is_left_alone_whatever_its_experts_are_worth(top_k: int, idle: int, leaves: int) -> None:
    policy = with_an_idle_layer(lfru(top_k), busy=4, idle=idle)
    [victim] = policy.victims(ExpertKey(0, 8), 1, never) or []
    assert victim.layer == leaves
    suspicion = policy.victims(ExpertKey(0, 8), 1, lambda key: key.layer == 0, chance=1.0)
    assert suspicion == ([victim] if leaves else None)
    assert policy.victims(ExpertKey(0, 8), 1, lambda key: key.layer == 0) is not None, "a floor is a wish"


def resident(policy: Lfru[ExpertKey]) -> set[ExpertKey]:
    return {key for keys in policy._entries.values() for key in keys}


def test_a_layer_takes_no_more_than_its_uploads_from_others() -> None:
    """Layer 1's entries are worth nothing; still the third newcomer of one step takes a place of its own layer."""
    policy = Lfru[ExpertKey](lambda key: (key.layer, key.expert), top_k=1, uploads=2)
    policy.step(step(0, 0, 1, 2))
    for key in [*(ExpertKey(1, expert) for expert in range(6)), *(ExpertKey(0, expert) for expert in range(3))]:
        policy.loaded(key, 1)
    policy.step(step(0, 0, 3, 4, 5))
    leaving = []
    for expert in (3, 4, 5):
        [victim] = policy.victims(ExpertKey(0, expert), 1, never) or []
        leaving.append(victim.layer)
        policy.evicted(victim)
        policy.loaded(ExpertKey(0, expert), 1)
    policy.step(step(0, 6))
    [victim] = policy.victims(ExpertKey(0, 6), 1, never) or []
    assert [*leaving, victim.layer] == [1, 1, 0, 1]


def test_a_forecast_decides_until_the_layers_next_step() -> None:
    policy = lfru(1)
    for expert in (0, 1, 2):
        policy.step(step(0, expert))
        policy.loaded(ExpertKey(0, expert), 1)
    assert policy.victims(ExpertKey(0, 3), 1, never) == [ExpertKey(0, 0)]
    policy.forecast(0, np.array([0.9, 0.1, 0.5, 0.5]))
    assert policy.victims(ExpertKey(0, 3), 1, never) == [ExpertKey(0, 1)]
    policy.step(step(0, 3))
    assert policy.victims(ExpertKey(0, 3), 1, never) == [ExpertKey(0, 0)]


def test_a_suspicion_takes_the_place_of_what_is_worth_less_only() -> None:
    policy = lfru(1)
    for expert in (0, 0, 0, 1):
        policy.step(step(0, expert))
    for expert in (0, 1):
        policy.loaded(ExpertKey(0, expert), 1)
    assert policy.victims(ExpertKey(0, 2), 1, never, chance=0.01) is None
    assert policy.victims(ExpertKey(0, 2), 1, never, chance=0.99) == [ExpertKey(0, 1)]


def test_a_token_that_chose_no_expert_of_a_layer_tells_nothing() -> None:
    policy = lfru()
    for token in range(12):
        for layer in range(3):
            policy.step(step(layer, *([] if token == 6 else [token % 4, 4 + token % 3])))
    for expert in range(4):
        policy.loaded(ExpertKey(0, expert), 1)
    assert policy.victims(ExpertKey(0, 7), 1, never) is not None


def test_steps_without_a_decision_take_little_memory() -> None:
    """A node that holds all that it serves decides nothing for weeks; what it computed must not pile up meanwhile."""
    policy = lfru()
    tracemalloc.start()
    try:
        for token in range(5000):
            policy.step(step(token % 48, *(300 + (token + number) % 100 for number in range(8))))
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    policy.loaded(ExpertKey(0, 300), 1)
    assert tuple(policy.victims(None, 1, never) or ()) == (ExpertKey(0, 300),)


def test_a_prompt_counts_as_the_tokens_that_it_has() -> None:
    """What all of its 64 tokens used is worth more than what 20 tokens before it used."""
    policy = lfru(1)
    for _ in range(20):
        policy.step(step(0, 0))
    policy.step(Uses(0, {ExpertKey(0, 1): 64}, 64))
    for expert in (0, 1):
        policy.loaded(ExpertKey(0, expert), 1)
    assert policy.victims(ExpertKey(0, 2), 1, never) == [ExpertKey(0, 0)]


def test_what_returns_is_judged_by_its_history() -> None:
    """The ghost list: expert 0 was used often, left, and is kept rather than a newcomer when it returns."""
    policy = lfru(1)
    for expert in [0] * 20 + [1, 2, 3]:
        policy.step(step(0, expert))
    policy.loaded(ExpertKey(0, 0), 1)
    policy.loaded(ExpertKey(0, 3), 1)
    assert policy.victims(ExpertKey(0, 4), 1, never) == [ExpertKey(0, 3)]


def test_keys_that_share_an_expert_are_told_apart() -> None:
    """One expert may be resident in two dtypes."""
    policy = Lfru[str](lambda key: (0, int(key[0])))
    for key in ("0a", "0b"):
        policy.step(Uses(0, {key: 1}))
        policy.loaded(key, 1)
    assert policy.victims("1a", 2, never) == ["0a", "0b"]
    policy.evicted("0a")
    assert policy.victims("1a", 1, never) == ["0b"]


def test_when_a_step_uses_more_than_fits_its_last_uses_leave_first() -> None:
    lru = Lru[str]()
    for key in "abc":
        lru.loaded(key, 1)
    wanted = dict.fromkeys("abcd", 1)
    sizes = dict.fromkeys("abc", 1)
    assert choose_victims(lru, "d", 1, sizes=sizes, wanted=wanted, keep=never) == ["c"]
    assert choose_victims(lru, "d", 1, sizes=sizes, wanted={"b": 1, "d": 1}, keep=never) == ["a"]
    assert choose_victims(lru, "d", 1, sizes=sizes, wanted=wanted, keep=lambda key: key != "a") == ["a"]
    assert choose_victims(lru, "d", 1, sizes=sizes, wanted=wanted, keep=lambda _: True) is None


# --- the traps --------------------------------------------------------------------------------------------------------


def test_a_walk_over_layers_that_do_not_all_fit() -> None:
    """Under LRU each layer's experts leave just before they are used again, all of them."""
    walk = [step(layer, 0, 1) for _ in range(20) for layer in range(8)]
    assert run(Lru(), walk, 14).hits == 0
    ours, best = run(lfru(), walk, 14), run(Belady(walk), walk, 14)
    assert ours.hit_rate > 0.7
    assert ours.hit_rate > best.hit_rate - 0.1


def test_a_scan_leaves_what_is_used_all_the_time() -> None:
    """Prompts use nearly every expert once; what decoding uses survives them better than under LRU."""
    decode = [step(layer, 0, 1) for _ in range(10) for layer in range(4)]
    prompt = [step(layer, *range(16), tokens=64) for layer in range(4)]
    steps = (decode + prompt) * 4
    assert run(lfru(), steps, 32).hit_rate > run(Lru(), steps, 32).hit_rate + 0.02


def test_one_hot_layer_gets_more_than_its_share_and_no_more() -> None:
    """Layer 0 uses all of eight experts in turn, the others the same two always."""
    steps = []
    for turn in range(60):
        steps.append(step(0, turn * 2 % 8, (turn * 2 + 1) % 8))
        steps += [step(layer, 0, 1) for layer in range(1, 4)]
    ours, lru = run(lfru(), steps, 12), run(Lru(), steps, 12)
    assert ours.hit_rate >= lru.hit_rate
    assert ours.hit_rate > 0.75, "the quiet layers always hit"


def test_a_new_domain_is_learned_within_a_few_tokens() -> None:
    def domain(first: int, tokens: int) -> list[Uses[ExpertKey]]:
        turns = [(first + turn % 4, first + (turn + 1) % 4) for turn in range(tokens)]
        return [step(layer, *experts) for experts in turns for layer in range(3)]

    steps = domain(0, 200) + domain(8, 40)
    before, after = run(lfru(), steps[:600], 15), run(lfru(), steps, 15)
    late_hits = after.hits - before.hits
    assert late_hits / (120 * 2) > 0.6, "the old favourites were not let go"


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_budget_of_exactly_the_floor_works(layers: int) -> None:
    """2 top_k + 1 experts, whatever the number of layers: slow, but nobody waits and nothing is lost."""
    random = np.random.default_rng(0)
    steps = [step(layer, *random.choice(8, 2, replace=False).tolist()) for _ in range(100) for layer in range(layers)]
    ours, lru = run(lfru(), steps, 5), run(Lru(), steps, 5)
    assert ours.hits + ours.misses == 200 * layers
    assert ours.hit_rate >= lru.hit_rate - 0.01
