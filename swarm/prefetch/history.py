"""What a layer saw of the tokens before: the last one, and decayed means over a few and over many of them.

Attention adds to a token's hidden state what it reads from earlier tokens. A predictor that stands before attention
cannot know that, but earlier tokens' own states at the same place tell it much.

T tokens, H hidden size. All float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

DECAYS: Final = (0.8, 0.95)  # of the means, per token
PARTS: Final = 1 + len(DECAYS)  # rows of a history
_BLOCK: Final = 64  # tokens whose histories are computed together
REACH: Final = 256  # tokens back, beyond which the slowest mean has forgotten (0.95 ** 256 is 2e-6)


def empty_history(hidden_size: int) -> Floats:
    """That of a session's first token: zeros [PARTS, H]."""
    return np.zeros((PARTS, hidden_size), dtype=np.float32)


def advance(history: Floats, rows: Floats) -> Floats:
    """The history [PARTS, H] after the tokens `rows` [T, H], in their order."""
    rows = rows[-REACH:]
    after = np.empty_like(history)
    after[0] = rows[-1]
    for part, decay in enumerate(DECAYS, 1):
        if len(rows) == 1:
            after[part] = decay * history[part] + (1 - decay) * rows[0]
            continue
        weights = ((1 - decay) * decay ** np.arange(len(rows) - 1, -1, -1)).astype(np.float32)  # [T]
        after[part] = decay ** len(rows) * history[part] + weights @ rows
    return after


def histories(rows: Floats, starts: NDArray[np.bool_]) -> Floats:
    """What each of `rows` [T, H] has before it: [T, PARTS, H]. A session begins where `starts` [T] says so."""
    before = np.zeros((len(rows), PARTS, rows.shape[1]), dtype=np.float32)
    bounds = [0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(rows)]
    for begin, end in pairwise(bounds):
        history = empty_history(rows.shape[1])
        for start in range(begin, end, _BLOCK):
            block = rows[start : min(start + _BLOCK, end)]
            before[start : start + len(block)] = _within(history, block)
            history = advance(history, block)
    return before


def _within(history: Floats, rows: Floats) -> Floats:
    """The histories [T, PARTS, H] of consecutive tokens, the first of which has `history`."""
    tokens = np.arange(len(rows))
    found = np.empty((len(rows), *history.shape), dtype=np.float32)
    found[0, 0], found[1:, 0] = history[0], rows[:-1]
    away = tokens[:, None] - 1 - tokens[None, :]  # [T, T]: tokens between
    for part, decay in enumerate(DECAYS, 1):
        weights = np.where(away >= 0, (1 - decay) * decay ** np.maximum(away, 0), 0.0).astype(np.float32)
        found[:, part] = weights @ rows + (decay**tokens)[:, None].astype(np.float32) * history[part]
    return found
