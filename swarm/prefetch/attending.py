"""What fitted guesses see of the tokens before: a small attention of their own, over what entered the same layer.

What a router sees differs from what enters its layer by what attention reads from earlier tokens. Means over those
tokens say little of it: which of them count depends on the token. So the guess looks for itself, in a few narrow
heads. Its keys and values are made from the states that enter the guessed layer, once per token, and serve the guesses
from every point; queries are made from the state that the guess is made from. Positions turn queries and keys (Su et
al., arXiv 2104.09864), and all heads but the first prefer near tokens, each in another degree (Press et al., arXiv
2108.12409). A head that finds nothing attends to a sink (Xiao et al., arXiv 2309.17453), whose score is always 0.

T tokens, H hidden size, N tokens remembered. All float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .history import Floats

HEADS: Final = 6
SIZE: Final = 16  # of a key, and of a value
WIDTH: Final = HEADS * SIZE
MIXED: Final = 128  # numbers that a guess makes of its state and of what it read
WINDOW: Final = 64  # tokens back that it can read
SLOPES: Final = np.array((0.0, 0.02, 0.1, 0.3, 0.6, 1.0), dtype=np.float32)  # of the heads, per token of distance
_TURNS: Final = 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)  # radians per token


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Makes keys and values of the states that enter a layer.

    weight: [H, 2 WIDTH], first the keys of all heads. sink: [HEADS, SIZE], the value that is always there.
    """

    weight: Floats
    sink: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Asker:
    """Asks what a Reader remembers on behalf of a guess, and mixes the answer with the guess's own state.

    query: [H, WIDTH]. query_offset: [WIDTH]. mix: [WIDTH + H, MIXED]. mix_offset: [MIXED].
    """

    query: Floats
    query_offset: Floats
    mix: Floats
    mix_offset: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Of one layer. keys, values: [HEADS, N, SIZE], of the N tokens before position `end`."""

    keys: Floats
    values: Floats
    end: int


def empty_memory() -> Memory:
    """That of a session's first token."""
    nothing = np.zeros((HEADS, 0, SIZE), dtype=np.float32)
    return Memory(nothing, nothing, 0)


def remember(reader: Reader, memory: Memory, rows: Floats, keep: int = WINDOW) -> Memory:
    """The memory after the tokens whose states `rows` [T, H] entered the layer; the last `keep` tokens of it."""
    end = memory.end + len(rows)
    rows = rows[-keep:]
    made = (rows @ reader.weight).reshape(len(rows), 2, HEADS, SIZE).transpose(1, 2, 0, 3)  # [2, HEADS, T, SIZE]
    keys = turned(made[0], end - len(rows))
    kept = max(0, keep - len(rows))
    first = max(0, memory.keys.shape[1] - kept)
    return Memory(
        np.concatenate((memory.keys[:, first:], keys), axis=1),
        np.concatenate((memory.values[:, first:], made[1]), axis=1),
        end,
    )


def ask(reader: Reader, asker: Asker, memory: Memory, rows: Floats, start: int) -> Floats:
    """What guesses are made from, [T, H + MIXED]: states `rows` [T, H] of consecutive tokens, and what they read.

    The first token's position is `start`. Each reads the WINDOW tokens before it, of those that `memory` has.
    """
    queries: Floats = (rows @ asker.query + asker.query_offset).reshape(len(rows), HEADS, SIZE).transpose(1, 0, 2)
    queries = turned(queries, start) * np.float32(SIZE**-0.5)
    held = memory.keys.shape[1]
    near: Floats = np.matmul(queries, memory.keys.transpose(0, 2, 1))  # [HEADS, T, N]
    near += _preference(len(rows), held, start - memory.end + held)
    most = near.max(axis=2, keepdims=True, initial=0.0)  # [HEADS, T, 1]
    near, sink = np.exp(near - most), np.exp(-most)
    read = np.matmul(near, memory.values) + sink * reader.sink[:, None]
    read /= near.sum(axis=2, keepdims=True) + sink
    answer = read.transpose(1, 0, 2).reshape(len(rows), WIDTH)
    mixed = answer @ asker.mix[:WIDTH] + rows @ asker.mix[WIDTH:] + asker.mix_offset
    mixed /= 1 + np.exp(-np.maximum(mixed, -80))  # SiLU; beyond, exp overflows and the result is 0 anyhow
    return np.concatenate((rows, mixed), axis=1)


def ask_of_all(reader: Reader, asker: Asker, entered: Floats, rows: Floats, starts: NDArray[np.bool_]) -> Floats:
    """`ask` for every token of sessions that begin where `starts` [T] says so; `entered` [T, H] the guessed layer."""
    found = np.empty((len(rows), rows.shape[1] + MIXED), dtype=np.float32)
    for begin, end in sessions(starts):
        memory = empty_memory()
        for start in range(begin, end, WINDOW):
            block = slice(start, min(start + WINDOW, end))
            memory = remember(reader, memory, entered[block], keep=2 * WINDOW)
            found[block] = ask(reader, asker, memory, rows[block], start - begin)
    return found


def sessions(starts: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where sessions begin and end, one of them at the first token."""
    return pairwise([0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(starts)])


def turned(rows: Floats, start: int) -> Floats:
    """Queries or keys [HEADS, T, SIZE] of positions from `start` on: pairs of numbers turned by what they say."""
    cosine, sine = _angles(start, rows.shape[1])
    one, other = rows[..., : SIZE // 2], rows[..., SIZE // 2 :]
    return np.concatenate((one * cosine - other * sine, other * cosine + one * sine), axis=-1)


@lru_cache(maxsize=8)
def _angles(start: int, count: int) -> tuple[Floats, Floats]:
    """Cosines and sines [T, SIZE / 2]; of one token all layers and points need the same."""
    angles = np.arange(start, start + count)[:, None] * _TURNS  # float64: a session may be long
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@lru_cache(maxsize=8)
def _preference(count: int, held: int, ahead: int) -> Floats:
    """What distance adds to scores [HEADS, T, N]; the first of T tokens is `ahead` of the first of N by so many."""
    away = np.arange(ahead, ahead + count)[:, None] - np.arange(held)
    return np.where((away > 0) & (away <= WINDOW), -SLOPES[:, None, None] * away.astype(np.float32), -np.inf)
