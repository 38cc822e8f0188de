"""Keys and values of the last generation, kept for a prompt that begins like it: the next turn of a conversation.

What is reused was computed from the same tokens, so the text stays the model's. It was computed in other batches than
a prompt that is read anew, which may change the last bits of logits as any batch size does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final

# Layers of transformers' caches that can forget their newest tokens. Others (sliding windows, linear attention) have
# overwritten what was before: they go on from where they are, or not at all.
_CROPPABLE: Final = ("DynamicLayer", "DynamicIndexedLayer")


def reusable(cached: Sequence[int], wanted: Sequence[int], *, croppable: bool) -> int:
    """How many tokens of a cache of `cached` serve the prompt `wanted`, whose last token is always computed."""
    pairs = zip(cached, wanted[:-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common if croppable or common == len(cached) else 0


class KeptPrefix:
    """The cache of one generation: of the last one, so never more memory than a conversation takes anyway."""

    def __init__(self) -> None:
        self._tokens: tuple[int, ...] = ()
        self._cache: Any = None

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """A cache of the beginning of `prompt`, and of how many tokens; (None, 0) where there is none.

        What was kept is given away or freed: a generation that fails leaves nothing behind.
        """
        tokens, cache = self._tokens, self._cache
        self.forget()
        if cache is None:
            return None, 0
        croppable = all(type(layer).__name__ in _CROPPABLE for layer in cache.layers)
        length = reusable(tokens, prompt, croppable=croppable)
        if length == 0:
            return None, 0
        if length < len(tokens):
            cache.crop(length - len(tokens))  # so many tokens less
        return cache, length

    def put(self, tokens: Sequence[int], cache: Any) -> None:
        """Keep what a generation of these tokens left; the last ones may not have been computed."""
        layers = getattr(cache, "layers", None)
        if layers:
            self._tokens, self._cache = tuple(tokens[: cache.get_seq_length()]), cache

    def forget(self) -> None:
        """Free it."""
        self._tokens, self._cache = (), None
