"""Which experts a session will use, told by its prompt: prefetch for links too slow to guess layer by layer.

A network carries an expert in the time of many tokens, so what is guessed must hold for a session. Prompt and answer
use much the same experts (arXiv 2604.23150), and other sessions rather different ones: balanced models are skewed
locally, not globally. So a prompt counts at once, and what earlier sessions used weighs like a few tokens. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PROMPT: Final = 16  # tokens in one call, from which it is taken for a session's prompt
OLD_TOKENS: Final = 32.0  # that all earlier sessions together count for when a prompt comes

Uses = Mapping[int, float]  # expert: tokens that used it


def begin_session(uses: Uses, tokens: float) -> tuple[dict[int, float], float]:
    """What a layer's counts of `tokens` earlier tokens weigh beside a new prompt."""
    share = min(1.0, OLD_TOKENS / tokens) if tokens else 1.0
    return {expert: share * count for expert, count in uses.items()}, share * tokens


def likely_experts(uses: Mapping[int, Uses], tokens: Mapping[int, float]) -> list[tuple[int, int]]:
    """(layer, expert) of all that was used, those first that the largest share of their layer's tokens used."""
    rated = [
        (-count / tokens[layer], layer, expert)
        for layer, counts in uses.items()
        for expert, count in counts.items()
        if count > 0
    ]
    return [(layer, expert) for _, layer, expert in sorted(rated)]


def coverage(
    fetched: Collection[tuple[int, int]],
    resident: Collection[tuple[int, int]],
    answer: NDArray[np.integer[Any]],
    layers: Sequence[int],
) -> float:
    """Share of an answer's misses with `resident` alone, [T, L, K], that `fetched` makes hits; 1 if none missed."""
    here, there = frozenset(resident), frozenset(fetched)
    missed = covered = 0
    for column, layer in enumerate(layers):
        experts, counts = np.unique(answer[:, column], return_counts=True)
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            if (layer, expert) not in here:
                missed += count
                covered += count * ((layer, expert) in there)
    return covered / missed if missed else 1.0
