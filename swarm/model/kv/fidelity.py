"""What a KV cache changes in a model's logits, measured on a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from moehive.protocol.errors import ConfigError

from .cache import kv_cache
from .options import KvMode, KvOptions

_PIECE = 32  # tokens that are read at a time: those before them come from the cache


@dataclass(frozen=True, slots=True)
class LogitError:
    """Against a full cache, over the positions of one text whose attention read stored blocks."""

    tokens: int  # of the text
    positions: int  # that were compared; 0: the text is too short for a stored block
    largest: float  # of all differences of a logit
    relative: float  # root mean square of the differences, as a part of that of the logits around their mean
    kl: float  # mean divergence of the distributions of the next token, in nats
    agreement: float  # part of the positions with the same likeliest token


@torch.inference_mode()
def logit_error(
    model: PreTrainedModel, input_ids: Tensor, kv: KvMode | KvOptions = "fp8", *, piece: int = _PIECE
) -> LogitError:
    """Read `input_ids` [B, T] twice, with a full cache and with `kv`, `piece` tokens at a time; compare the logits.

    0 everywhere for a lossless mode. Raises ConfigError for an empty text and for mode full, and what the cache and the
    experts raise.
    """
    options = kv if isinstance(kv, KvOptions) else KvOptions(kv)
    length = input_ids.shape[1]
    if length == 0:
        raise ConfigError("there is no text to measure the error of a KV cache on")
    exact, other = DynamicCache(config=model.config), kv_cache(model, options, max_tokens=length)
    sums = _Sums()
    for start in range(0, length, piece):
        ids = input_ids[:, start : start + piece]
        stored = other.stats().stored_tokens
        wanted, found = _logits(model, ids, exact), _logits(model, ids, other)  # [B, n, V]
        if stored:
            sums.add(wanted, found)
    return sums.result(length)


def _logits(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits.double()


@dataclass(slots=True)
class _Sums:
    """Over positions."""

    positions: int = 0
    largest: float = 0.0
    differences: float = 0.0
    spread: float = 0.0
    kl: float = 0.0
    agreements: int = 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Logits [B, n, V] with the full cache and with the other."""
        difference = found - wanted
        self.positions += wanted.shape[0] * wanted.shape[1]
        self.largest = max(self.largest, float(difference.abs().max()))
        self.differences += float(difference.square().mean(-1).sum())
        self.spread += float(wanted.var(-1, correction=0).sum())
        likely, less = wanted.log_softmax(-1), found.log_softmax(-1)
        self.kl += float((likely.exp() * (likely - less)).sum())
        self.agreements += int((wanted.argmax(-1) == found.argmax(-1)).sum())

    def result(self, tokens: int) -> LogitError:
        """The means."""
        count = self.positions
        if count == 0:
            return LogitError(tokens, 0, 0.0, 0.0, 0.0, 1.0)
        relative = (self.differences / self.spread) ** 0.5 if self.spread else 0.0
        return LogitError(tokens, count, self.largest, relative, self.kl / count, self.agreements / count)
