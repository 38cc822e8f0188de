"""Prefetch in a running model: a hook tells what enters a decoder layer, the backend what its experts compute with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moehive.protocol.ids import ExpertKey
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.seats import backend_of
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.tiers.residency import Speculation

from .control import Limits
from .files import read_predictor
from .fitting import Routers, by_routers
from .history import REACH
from .measure import Usefulness
from .predictors import Predictor, unit
from .prefetcher import Prefetcher
from .routers import decoder_layers, routers_of


class TierShelf:
    """A tier of experts' weights as a Shelf. `dtype` is that of the rows seen last: what is loaded must be of it."""

    def __init__(self, tier: WeightsTier, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._tier = tier

    @property
    def load_seconds(self) -> float:
        """See Shelf."""
        return self._tier.load_seconds

    @property
    def stalled_seconds(self) -> float:
        """See Shelf."""
        return self._tier.stalled_seconds

    def absent(self, layer: int, experts: Sequence[int]) -> Sequence[bool]:
        """See Shelf."""
        return self._tier.absent([(ExpertKey(layer, expert), self.dtype) for expert in experts])

    def prefetch(self, layer: int, ranked: Sequence[tuple[int, float]], most: int) -> int:
        """See Shelf."""
        keys = [((ExpertKey(layer, expert), self.dtype), chance) for expert, chance in ranked]
        return self._tier.prefetch(layer, keys, most=most)

    def outcomes(self) -> Sequence[Speculation]:
        """See Shelf."""
        return self._tier.outcomes()


class ModelPrefetch:
    """A Prefetcher that a model tells what it computes. `close` ends that."""

    def __init__(self, model: nn.Module, backend: LocalExperts, predictor: Predictor, routers: Routers,
                 dtype: torch.dtype, limits: Limits | None = None) -> None:  # fmt: skip
        self._shelf = TierShelf(backend.tier, dtype)
        layers = sorted(routers)
        self.prefetcher = Prefetcher(predictor, self._shelf, layers, routers=routers, limits=limits)
        self._backend = backend
        self._first = layers[0]
        # Two generations of one model at a time spoil each other's guesses, and nothing else.
        self._lock = threading.Lock()
        blocks = decoder_layers(model)
        self._hooks = [
            blocks[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer in layers
            if layer in blocks
        ]
        backend.watcher = self

    def close(self) -> None:
        """Guess no more."""
        self._backend.watcher = None
        for hook in self._hooks:
            hook.remove()

    def computing(self, layer: int, hidden: Tensor, experts: Sequence[int]) -> None:
        """See backend.Watcher."""
        if not self.prefetcher.idle:
            self._shelf.dtype = hidden.dtype
            self._tell(lambda: self.prefetcher.computing(layer, _array(hidden), experts))

    def _hook(self, layer: int) -> Callable[..., None]:
        def entering(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if layer == self._first or not self.prefetcher.idle:
                hidden = arguments[0] if arguments else named["hidden_states"]
                self._tell(lambda: self.prefetcher.entering(layer, unit(_array(hidden))))

        return entering

    def _tell(self, what: Callable[[], None]) -> None:
        if self._lock.acquire(blocking=False):
            try:
                what()
            finally:
                self._lock.release()


def attach_prefetch(
    model: Any, backend: LocalExperts, *, predictor: Path | None = None, limits: Limits | None = None
) -> ModelPrefetch | None:
    """Let `model` load experts into `backend`'s tier before it needs them.

    Guesses come from a file that `moehive trace fit` wrote, or from the model's own routers, and get better as the
    model generates. None where all experts fit, so that there is nothing to gain; a file is read all the same, for what
    is wrong with it. Raises UnsupportedModel where routers cannot be found; what read_predictor raises.
    """
    fits = backend.fits(model.dtype)
    if fits and predictor is None:
        return None
    routers = routers_of(model)
    found = by_routers(routers, backend.top_k) if predictor is None else read_predictor(predictor, routers)
    return None if fits else ModelPrefetch(model, backend, found, routers, model.dtype, limits)


def usefulness_of(model: nn.Module) -> Usefulness | None:
    """What prefetch has been worth to `model` so far; None where there is none."""
    backend = backend_of(model)
    watcher = backend.watcher if isinstance(backend, LocalExperts) else None
    return watcher.prefetcher.usefulness if isinstance(watcher, ModelPrefetch) else None


def _array(hidden: Tensor) -> Any:
    """The last rows of `hidden` [..., H], as many as count, as float32 [T, H]."""
    rows = hidden.detach().reshape(-1, hidden.shape[-1])[-REACH:]
    return rows.to("cpu", torch.float32).numpy()
