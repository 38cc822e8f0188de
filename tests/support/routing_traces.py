"""Synthetic routing: for each token of one layer, the experts that it chose."""

from __future__ import annotations

import random

Trace = list[frozenset[int]]


def recent(experts: int, top_k: int, tokens: int, *, locality: float, seed: int) -> Trace:
    """Experts used lately are used again: drawn by their place in an LRU stack, with weight 1 / place ** locality."""
    chance, stack = random.Random(seed), list(range(experts))
    chance.shuffle(stack)
    weights = [1 / (place + 1) ** locality for place in range(experts)]
    trace: Trace = []
    for _ in range(tokens):
        chosen = [stack[place] for place in _distinct(chance, weights, top_k)]
        stack = chosen + [expert for expert in stack if expert not in chosen]
        trace.append(frozenset(chosen))
    return trace


def popular(experts: int, top_k: int, tokens: int, *, skew: float, seed: int) -> Trace:
    """Some experts are used more than others, always the same: Zipf weights; skew 0 is uniform."""
    chance, order = random.Random(seed), list(range(experts))
    chance.shuffle(order)
    weights = [1 / (place + 1) ** skew for place in range(experts)]
    return [frozenset(order[place] for place in _distinct(chance, weights, top_k)) for _ in range(tokens)]


def _distinct(chance: random.Random, weights: list[float], count: int) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen.setdefault(chance.choices(range(len(weights)), weights)[0])
    return list(chosen)
