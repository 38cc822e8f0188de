"""Traces like those of published models, made from a seed: for planning memory, and for testing policies.

Router logits of each layer are drawn as a sum of four Gaussians: how popular an expert is at all, how much the session
at hand likes it, a part that changes slowly from token to token (an autoregressive process), and noise. The top k are
used. The five parameters of a family were fitted, by random search, to the hit rates of LRU, LFU and Belady's policy
from 12.5 to 75 % resident that were measured on the model itself (arXiv 2505.16056, figure "mchr"; FAMILIES has some of
them). A generator of LRU stack distances would fit the LRU curve alone; under it no policy can beat LRU (Coffman and
Denning, "Operating Systems Theory", 1973, theorem 6.3), which the LFU curves of real models contradict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from .routing import RoutingTrace


@dataclass(frozen=True, slots=True)
class Family:
    """A model's shape, its published curves, and the parameters that reproduce them."""

    layers: int
    experts: int
    top_k: int
    popularity: float  # standard deviation over experts, as all the following in units of the noise
    session: float
    drift: float
    memory: float  # correlation of the slowly changing part from one token to the next
    unevenness: float  # of session and drift between layers (logarithmic)
    curves: Mapping[float, tuple[float, float, float]]  # share resident: hit rates of LRU, LFU, Belady


FAMILIES: Final[Mapping[str, Family]] = {
    "mixtral-8x7b": Family(
        32,
        8,
        2,
        popularity=0.585,
        session=0.714,
        drift=2.81,
        memory=0.174,
        unevenness=0.362,
        curves={0.25: (0.36, 0.33, 0.59), 0.5: (0.61, 0.60, 0.82), 0.75: (0.83, 0.83, 0.94)},
    ),
    "phi-3.5-moe": Family(
        32,
        16,
        2,
        popularity=0.803,
        session=0.717,
        drift=0.25,
        memory=0.987,
        unevenness=0.206,
        curves={0.25: (0.63, 0.61, 0.79), 0.5: (0.85, 0.85, 0.94), 0.75: (0.97, 0.97, 0.99)},
    ),
    "qwen3-30b-a3b": Family(
        48,
        128,
        8,
        popularity=1.278,
        session=0.545,
        drift=0.789,
        memory=0.897,
        unevenness=0.224,
        curves={0.25: (0.83, 0.79, 0.92), 0.5: (0.97, 0.96, 0.99), 0.75: (1.00, 1.00, 0.99)},
    ),
    "deepseek-v2-lite": Family(
        26,
        64,
        6,
        popularity=0.814,
        session=0.886,
        drift=2.391,
        memory=0.409,
        unevenness=0.531,
        curves={0.25: (0.50, 0.46, 0.72), 0.5: (0.73, 0.71, 0.89), 0.75: (0.90, 0.90, 0.96)},
    ),
    "qwen1.5-moe-a2.7b": Family(
        24,
        60,
        4,
        popularity=0.56,
        session=0.899,
        drift=2.978,
        memory=0.333,
        unevenness=0.289,
        curves={0.25: (0.41, 0.39, 0.68), 0.5: (0.66, 0.65, 0.86), 0.75: (0.86, 0.86, 0.95)},
    ),
    "olmoe-1b-7b": Family(
        16,
        64,
        8,
        popularity=1.153,
        session=0.875,
        drift=1.573,
        memory=0.476,
        unevenness=0.454,
        curves={0.25: (0.61, 0.59, 0.79), 0.5: (0.83, 0.82, 0.93), 0.75: (0.96, 0.96, 0.99)},
    ),
    "qwen2-57b-a14b": Family(
        28,
        64,
        8,
        popularity=0.685,
        session=0.116,
        drift=2.519,
        memory=0.323,
        unevenness=0.163,
        curves={0.25: (0.38, 0.38, 0.66), 0.5: (0.63, 0.64, 0.85), 0.75: (0.86, 0.87, 0.96)},
    ),
    "grin-moe": Family(
        32,
        16,
        2,
        popularity=0.707,
        session=0.642,
        drift=0.096,
        memory=0.998,
        unevenness=0.61,
        curves={0.25: (0.60, 0.59, 0.78), 0.5: (0.83, 0.83, 0.93), 0.75: (0.96, 0.96, 0.98)},
    ),
}


def synthesize(
    name: str, *, seed: int = 0, layers: int | None = None, sessions: int = 1, prompt: int = 512, answer: int = 384
) -> RoutingTrace:
    """A trace like `name`'s: `sessions`, each with a prompt (one call) and an answer (one call per token).

    `layers` below the family's own makes a smaller trace with the same statistics: layers are drawn independently.
    """
    family = FAMILIES[name]
    count = family.layers if layers is None else min(layers, family.layers)
    random = np.random.default_rng(seed)
    spread = np.exp(family.unevenness * random.standard_normal((count, 1)))  # [L, 1]
    popular = family.popularity * random.standard_normal((count, family.experts))  # [L, E]
    experts = [_session(family, popular, spread, prompt + answer, random) for _ in range(sessions)]  # [T, L, K] each
    calls = ([prompt] if prompt else []) + [1] * answer
    starts = np.zeros(len(calls), dtype=np.bool_)
    starts[0] = True
    return RoutingTrace(
        model=name,
        layers=tuple(range(count)),
        num_experts=family.experts,
        tokens=np.array(calls * sessions, dtype=np.int32),
        starts=np.tile(starts, sessions),
        experts=np.concatenate(experts),
    )


def _session(
    family: Family, popular: np.ndarray, spread: np.ndarray, tokens: int, random: np.random.Generator
) -> np.ndarray:
    shape = popular.shape
    liked = popular + family.session * spread * random.standard_normal(shape)  # [L, E]
    slow = random.standard_normal(shape)  # [L, E]
    fresh = np.sqrt(1 - family.memory**2)
    chosen = np.empty((tokens, shape[0], family.top_k), dtype=np.uint16)
    for token in range(tokens):
        slow = family.memory * slow + fresh * random.standard_normal(shape)
        logits = liked + family.drift * spread * slow + random.standard_normal(shape)
        chosen[token] = np.argpartition(-logits, family.top_k - 1, axis=1)[:, : family.top_k]
    return chosen
