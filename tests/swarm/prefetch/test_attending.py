"""The small attention of fitted guesses: alike token by token and at once, blind to what is far, and to the session."""

from __future__ import annotations

import numpy as np
import pytest

from moehive.swarm.prefetch.attending import (
    HEADS,
    MIXED,
    SIZE,
    WIDTH,
    WINDOW,
    Asker,
    Reader,
    ask,
    ask_of_all,
    empty_memory,
    remember,
)  # fmt: skip
from moehive.swarm.prefetch.history import Floats

HIDDEN = 12


def drawn(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


READER = Reader(drawn(HIDDEN, 2 * WIDTH) / 4, drawn(HEADS, SIZE))
ASKER = Asker(drawn(HIDDEN, WIDTH), drawn(WIDTH), drawn(WIDTH + HIDDEN, MIXED) / 4, drawn(MIXED))


def one_by_one(entered: Floats, rows: Floats) -> Floats:
    memory, found = empty_memory(), []
    for token in range(len(rows)):
        found.append(ask(READER, ASKER, memory, rows[token : token + 1], memory.end)[0])
        memory = remember(READER, memory, entered[token : token + 1])
    return np.array(found)


@pytest.mark.parametrize("tokens", [1, 2, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
def test_all_tokens_at_once_are_like_one_after_the_other(tokens: int) -> None:
    entered, rows = drawn(tokens, HIDDEN), drawn(tokens, HIDDEN, seed=1)
    starts = np.arange(tokens) == 0
    assert ask_of_all(READER, ASKER, entered, rows, starts) == pytest.approx(one_by_one(entered, rows), abs=1e-4)


def test_a_session_knows_nothing_of_the_one_before() -> None:
    entered, rows = drawn(100, HIDDEN), drawn(100, HIDDEN, seed=1)
    starts = np.isin(np.arange(100), (0, 30))
    found = ask_of_all(READER, ASKER, entered, rows, starts)
    assert found[30:] == pytest.approx(one_by_one(entered[30:], rows[30:]), abs=1e-4)
    assert found[30:] != pytest.approx(one_by_one(entered, rows)[30:], abs=1e-2)


def test_many_tokens_are_remembered_like_one_after_the_other() -> None:
    entered = drawn(WINDOW + 20, HIDDEN)
    several, single = remember(READER, empty_memory(), entered[:7]), empty_memory()
    several = remember(READER, several, entered[7:])
    for token in range(len(entered)):
        single = remember(READER, single, entered[token : token + 1])
    assert several.end == single.end == len(entered)
    assert several.keys.shape == single.keys.shape == (HEADS, WINDOW, SIZE)
    assert several.keys == pytest.approx(single.keys, abs=1e-4)
    assert several.values == pytest.approx(single.values, abs=1e-4)


@pytest.mark.parametrize(("changed", "matters"), [(0, False), (1, True), (WINDOW, True)])
def test_only_the_last_tokens_are_read(changed: int, matters: bool) -> None:
    """Asked at once, so that more is held than may be read."""
    entered, rows = drawn(WINDOW + 2, HIDDEN), drawn(WINDOW + 2, HIDDEN, seed=1)
    starts = np.arange(len(rows)) == 0
    before = ask_of_all(READER, ASKER, entered, rows, starts)
    entered[changed] += 3
    after = ask_of_all(READER, ASKER, entered, rows, starts)
    assert (after[: changed + 1] == before[: changed + 1]).all(), "what comes later cannot be known"
    assert bool(np.abs(after[WINDOW + 1] - before[WINDOW + 1]).max() > 1e-4) is matters


def test_how_long_a_session_has_lasted_does_not_count() -> None:
    entered, rows = drawn(20, HIDDEN), drawn(1, HIDDEN, seed=1)
    late = remember(READER, empty_memory(), drawn(100_000, HIDDEN, seed=2)[:1].repeat(100_000, axis=0))
    late = remember(READER, late, entered, keep=20)
    early = remember(READER, empty_memory(), entered)
    found, expected = (ask(READER, ASKER, memory, rows, memory.end) for memory in (late, early))
    assert found == pytest.approx(expected, abs=1e-3)


def test_what_was_asked_comes_first_and_the_same_state_asks_the_same() -> None:
    rows = drawn(1, HIDDEN)
    found = ask(READER, ASKER, empty_memory(), rows, 0)
    assert found.shape == (1, HIDDEN + MIXED)
    assert found.dtype == np.float32
    assert (found[:, :HIDDEN] == rows).all()
