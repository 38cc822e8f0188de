"""What a policy would have made of a recorded sequence of uses: a tier's decisions without the tier.

Pure but for the policy's own state. tests/swarm/tiers compares it with a real tier, event by event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Generic

from .policy import Chances, K, Policy, Uses, choose_victims


@dataclass(frozen=True, slots=True)
class Replay:
    """How often an entry was resident when it was used."""

    hits: int
    misses: int
    evictions: int
    steps: int
    clean_steps: int  # without any miss: what the speed of decoding depends on

    @property
    def hit_rate(self) -> float:
        """Hits per use; 0 for an empty trace."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def clean_share(self) -> float:
        """Steps without a miss, per step; 0 for an empty trace."""
        return self.clean_steps / max(1, self.steps)


def replay(
    policy: Policy[K],
    steps: Iterable[Uses[K]],
    size: Callable[[K], int],
    budget: int,
    forecasts: Iterable[tuple[int, Chances] | None] | None = None,
) -> Replay:
    """Run `steps` through a fresh policy and a budget of bytes; after each, tell it the next of `forecasts`, if any.

    A forecast is a layer and the chances of its experts. Every entry must fit the budget alone.
    """
    tier = _Tier(policy, size, budget)
    told: Iterator[tuple[int, Chances] | None] = repeat(None) if forecasts is None else iter(forecasts)
    count = clean = 0
    for uses, forecast in zip(steps, told, strict=False):
        misses = tier.misses
        tier.step(uses)
        if forecast is not None:
            policy.forecast(*forecast)
        count += 1
        clean += tier.misses == misses
    return Replay(tier.hits, tier.misses, tier.evictions, count, clean)


class _Tier(Generic[K]):
    """Residency of entries that are used one after the other, those of a step protected until they were used."""

    def __init__(self, policy: Policy[K], size: Callable[[K], int], budget: int) -> None:
        self.hits = self.misses = self.evictions = 0
        self._policy = policy
        self._size = size
        self._budget = budget
        self._sizes: dict[K, int] = {}
        self._used = 0

    def step(self, uses: Uses[K]) -> None:
        self._policy.step(uses)
        wanted = dict.fromkeys(uses.rows)
        for key in uses.rows:
            if key in self._sizes:
                self.hits += 1
            else:
                self.misses += 1
                self._load(key, wanted)
            del wanted[key]

    def _load(self, key: K, wanted: dict[K, None]) -> None:
        size = self._size(key)
        need = self._used + size - self._budget
        if need > 0:
            victims = choose_victims(self._policy, key, need, sizes=self._sizes, wanted=wanted, keep=_nothing)
            assert victims is not None, f"{key} of {size} bytes in a budget of {self._budget}"
            for victim in victims:
                self._used -= self._sizes.pop(victim)
                self.evictions += 1
                self._policy.evicted(victim)
        self._sizes[key] = size
        self._used += size
        self._policy.loaded(key, size)


def _nothing(_: object) -> bool:
    return False
