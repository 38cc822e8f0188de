"""Traces like those of published models, made from a seed: for planning memory, and for testing policies.

Router logits of each layer are drawn as a sum of four Gaussians: how popular an expert is at all, how much the session
at hand likes it, a part that changes slowly from token to token (an autoregressive process), and noise. The top k are
used. The five parameters of a family were fitted, by random search, to the hit rates of LRU, LFU and Belady's policy at
12.5, 25, 50 and 75 % resident that were measured on the model itself (arXiv 2505.16056, figure "mchr"; FAMILIES has
both). A generator of LRU stack distances would fit the LRU curve alone; under it no policy can beat LRU (Coffman and
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


FAMILIES: Final[Mapping[str, Family]] = {}


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
