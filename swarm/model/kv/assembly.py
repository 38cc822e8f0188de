"""Puts a layer's stored tokens into the places that they have among all of its tokens."""

from __future__ import annotations

from torch import Tensor

from .codecs import Codec
from .layout import KvLayout, Pair
from .memory import view_bytes


class Assembly:
    """A `Destination` over a slot's buffer: blocks of `block_tokens` tokens each, and the newest tokens after them."""

    def __init__(self, layout: KvLayout, codec: Codec, block_tokens: int, buffer: Tensor, total: int) -> None:
        self._layout = layout
        self._codec = codec
        self._tokens = block_tokens
        self._buffer = buffer
        self._total = total
        self._whole = layout.spaced_views(buffer, total)  # [B, H, total, D] each

    def parts(self, count: int) -> list[memoryview] | None:
        """See Destination: stored as they are, blocks are read from the file straight to their places."""
        if not self._codec.lossless or self._buffer.device.type != "cpu":
            return None
        view = view_bytes(self._buffer)
        return [
            view[start:end]
            for index in range(count)
            for start, end in self._layout.runs(self._total, index * self._tokens, self._tokens)
        ]

    def put(self, first: int, blocks: Tensor) -> None:
        """See Destination."""
        places = self._places(first * self._tokens, blocks.shape[0] * self._tokens)
        self._codec.decode(self._layout, blocks, *places)

    def put_tail(self, tail: Pair, first: int, count: int) -> None:
        """The first `count` tokens of `tail`, [B, H, block_tokens, D] each, from place `first`."""
        for place, newest in zip(self._places(first, count), tail, strict=True):
            place.copy_(newest[:, :, :count])

    def _places(self, first: int, count: int) -> Pair:
        keys, values = self._whole
        return keys[:, :, first : first + count], values[:, :, first : first + count]
