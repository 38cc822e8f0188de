"""How a KV cache divides its working memory, and what leaves it: functions from facts to decisions.

Every step reads every stored token once, layer after layer: a cyclic scan, in which recency says nothing (least
recently used would keep exactly what is not needed next) and any fixed set of blocks is read as often as any other of
its size. So the oldest tokens leave first, evenly over the layers, and do not come back: what stays are the newest,
which rolling back a few tokens needs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moehive.protocol.errors import BudgetTooSmall

_BLOCK_BYTES: Final = 256 << 10
_BLOCK_TOKENS: Final = (64, 2048)  # fewest and most
_TAIL_SHARE: Final = 16


def block_length(token_bytes: int, layers: int, budget: int) -> int:
    """Tokens of a block: a power of two that makes it about 256 KiB, long enough to be read at the disk's own speed.

    Fewer where the newest tokens of all layers, which are no block yet, would take more than a 16th of the budget.
    """
    fewest, most = _BLOCK_TOKENS
    tokens = most
    while tokens > fewest and (
        tokens * token_bytes > _BLOCK_BYTES or tokens * token_bytes * layers * _TAIL_SHARE > budget
    ):
        tokens //= 2
    return tokens


@dataclass(frozen=True, slots=True)
class KvFacts:
    """What the division depends on. Bytes."""

    budget: int  # of working memory
    layers: int  # that spill
    slot: int  # keys and values of the largest layer at the length that is needed now
    roomy_slot: int  # the same with room to grow
    tail: int  # the newest tokens of one layer, too few for a block
    block: int  # the largest stored block
    tokens: int  # the length that is needed now; for messages
    window: int | None = None  # blocks of each layer that have to stay, and no more; None: as many as fit


@dataclass(frozen=True, slots=True)
class KvPlan:
    """The division. Bytes."""

    slots: int  # layers that are whole in memory at a time: the one that computes, and with 2 the next one
    slot: int  # size of each
    resident: int  # for stored blocks that stay in working memory
    window: int | None  # blocks of each layer that stay; None: as many as fit
    transit: int  # for blocks on their way from tier to tier: one, or several small ones


def divide(facts: KvFacts) -> KvPlan:
    """Two slots where they fit, room to grow where it fits, and blocks in what is left.

    A second slot comes before resident blocks: reading the next layer while this one computes hides nearly all of the
    reading, blocks worth one layer save one layer's share of it. Raises BudgetTooSmall with the least that would do.
    """
    window = (facts.window or 0) * facts.layers * facts.block
    fixed = facts.layers * facts.tail + facts.block + window
    for slots in (2, 1):
        for slot in (facts.roomy_slot, facts.slot):
            left = facts.budget - fixed - slots * slot
            if left >= 0:
                more = max(0, min(_BLOCK_BYTES - facts.block, left // 2)) // facts.block * facts.block
                return KvPlan(slots, slot, left - more + window, facts.window, facts.block + more)
    raise BudgetTooSmall(f"KV cache of {facts.tokens} tokens", budget=facts.budget, needed=fixed + facts.slot)


def missing_on_disk(facts: KvFacts, plan: KvPlan, block_tokens: int, lower: int) -> int:
    """Bytes by which `lower` (host and disk together) fails to hold what does not stay in working memory; 0 if none."""
    stored = facts.layers * (facts.tokens // block_tokens) * facts.block
    return max(0, stored - plan.resident - lower)


def next_to_spill(tier: Sequence[tuple[int, int]], *, over: bool, window: int | None = None) -> int | None:
    """The layer whose oldest block in a tier leaves it; None where none has to.

    `tier` says of each layer which number its oldest block there has, and how many it has there. `over`: the tier holds
    more bytes than it may. `window`: blocks of each layer that may stay. The oldest block goes first, of equally old
    ones the first layer's.
    """
    allowed = 0 if over else window
    due = [] if allowed is None else [layer for layer, (_, count) in enumerate(tier) if count > allowed]
    return min(due, key=lambda layer: tier[layer][0], default=None)
