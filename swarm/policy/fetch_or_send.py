"""Which experts to fetch in the background, instead of sending rows to their holders for ever: a decision on facts.

A layer waits for the network if one of its experts is missing, so an expert alone is worth little: what counts is how
many tokens find all of theirs. That share is forecast from how often each expert was used (as if tokens chose experts
independently of each other), for every set of the most used ones; the set is fetched that saves the most waiting over
the tokens to come, less its price.

A forecast that errs buys what is not used, so it errs towards sending: experts left out are taken to be used two
standard deviations more often than was counted, and until FORECAST_TOKENS were seen the only set considered is all of
the layer. Where the caller does not say how many tokens it will generate, as many are expected as came so far; then a
layer that has paid as much waiting as its used experts cost is fetched whatever the forecast says (rent or buy, Karlin
et al., 1988).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt

FORECAST_TOKENS = 48
_DEVIATIONS = 2.0
_LEAST_HORIZON = 16.0  # tokens expected at the start, where nobody says how many


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What is known of one layer."""

    uses: Mapping[int, float]  # how many of the last `tokens` tokens chose each expert; absent: none
    tokens: float
    experts: int  # of the layer
    resident: Collection[int]  # experts that are here, or on their way
    wait: float  # seconds that a token waits in this layer when an expert is missing
    price: float  # seconds of the link that one expert takes
    horizon: float | None  # tokens to come; None where the caller does not say
    paid: float = 0.0  # seconds waited in this layer since an expert was last fetched for it
    room: int = 1 << 30  # experts that fit


def experts_to_fetch(layer: LayerFacts) -> tuple[int, ...]:
    """Missing experts that are worth fetching, the most used first; () where sending rows is cheaper."""
    here = frozenset(layer.resident)
    missing = [expert for expert in range(layer.experts) if expert not in here]
    missing.sort(key=lambda expert: -layer.uses.get(expert, 0.0))  # stable
    chosen = missing[: _best_count(layer, missing)]
    if not chosen and layer.horizon is None:
        used = [expert for expert in missing if layer.uses.get(expert, 0.0) > 0][: layer.room]
        chosen = used if layer.paid >= layer.price * len(used) else []
    return tuple(chosen)


def _best_count(layer: LayerFacts, missing: list[int]) -> int:
    """How many of `missing`, in their order, to fetch."""
    absent = [1.0 - _chance(layer, expert) for expert in missing]
    hit = 1.0  # share of the tokens that find all their experts, once so many are fetched; from the last one backwards
    hits = [hit]
    for chance in reversed(absent):
        hit *= chance
        hits.append(hit)
    hits.reverse()
    horizon = max(layer.tokens, _LEAST_HORIZON) if layer.horizon is None else layer.horizon
    first = 1 if layer.tokens >= FORECAST_TOKENS else len(missing)
    best, best_value = 0, 0.0
    for count in range(first, min(len(missing), layer.room) + 1):
        value = layer.wait * (hits[count] - hits[0]) * horizon - layer.price * count
        if value > best_value:
            best, best_value = count, value
    return best


def _chance(layer: LayerFacts, expert: int) -> float:
    """That a token chooses an expert, rather too much than too little.

    What none was seen to choose shares the chance of what was chosen once (Good, 1953).
    """
    uses = layer.uses.get(expert, 0.0)
    if uses <= 0:
        once = sum(1 for each in layer.uses.values() if 0 < each <= 1)
        unseen = layer.experts - sum(1 for each in layer.uses.values() if each > 0)
        return _at_most(max(once, 0.5), layer.tokens) / max(unseen, 1)
    return _at_most(uses, layer.tokens)


def _at_most(uses: float, tokens: float) -> float:
    return min((uses + _DEVIATIONS * sqrt(uses)) / (tokens + 1.0), 1.0)
