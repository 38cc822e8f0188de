"""How the keys and values of one attention layer lie in a flat buffer of bytes.

Keys come first, values after them, each a contiguous [B, H, T, D]. That is what `torch.cat` in transformers'
`DynamicCache` gives attention; kernels may round differently for other strides or alignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]  # keys and values

ALIGNMENT: Final = 64  # bytes: that of torch's own allocator


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shapes of a layer's keys and values, all but the number of tokens. The two may differ: MLA caches two latents."""

    batch: int
    heads: tuple[int, int]
    dims: tuple[int, int]  # elements of one head of one token
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KvLayout:
        """That of keys and values [B, H, T, D]."""
        return cls(
            keys.shape[0], (keys.shape[1], values.shape[1]), (keys.shape[3], values.shape[3]), keys.dtype, keys.device
        )

    def with_batch(self, batch: int) -> KvLayout:
        """The same for another number of sequences."""
        return KvLayout(batch, self.heads, self.dims, self.dtype, self.device)

    def empty(self, tokens: int) -> Pair:
        """Keys and values [B, H, tokens, D] with any content."""
        buffer = torch.empty(self.spaced(tokens), dtype=torch.uint8, device=self.device)
        return self.spaced_views(buffer, tokens)

    @property
    def rows(self) -> tuple[int, int]:
        """Vectors that one token adds to the keys and to the values."""
        return self.batch * self.heads[0], self.batch * self.heads[1]

    def packed(self, tokens: int) -> int:
        """Bytes of keys and values one behind the other."""
        return sum(self._sizes(tokens))

    def spaced(self, tokens: int) -> int:
        """Bytes where both begin at a multiple of ALIGNMENT, as separate tensors would."""
        keys, values = self._sizes(tokens)
        return _align(keys) + _align(values)

    def block_views(self, blocks: Tensor, tokens: int) -> Pair:
        """Keys and values [B, H, m, tokens, D] in m packed blocks [m, packed(tokens)] uint8."""
        keys, values = self._sizes(tokens)
        return (
            self.in_order(blocks[:, :keys].view(self.dtype), self.heads[0], tokens),
            self.in_order(blocks[:, keys : keys + values].view(self.dtype), self.heads[1], tokens),
        )

    def in_order(self, parts: Tensor, heads: int, tokens: int) -> Tensor:
        """A view [B, H, m, tokens, D] of m parts [m, B * H * tokens * D] of blocks."""
        return parts.view(parts.shape[0], self.batch, heads, tokens, -1).permute(1, 2, 0, 3, 4)

    def spaced_views(self, buffer: Tensor, tokens: int) -> Pair:
        """Keys and values [B, H, tokens, D] in the `spaced(tokens)` first bytes of `buffer`."""
        keys, values = self._sizes(tokens)
        start = _align(keys)
        return (
            buffer[:keys].view(self.dtype).view(self.batch, self.heads[0], tokens, self.dims[0]),
            buffer[start : start + values].view(self.dtype).view(self.batch, self.heads[1], tokens, self.dims[1]),
        )

    def runs(self, total: int, first: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Where the bytes of a packed block go that holds tokens [first, first + tokens) of `total`.

        Ranges of bytes (start, end) in a spaced buffer, in the order in which the block has them.
        """
        origins = (0, _align(self._sizes(total)[0]))
        for origin, rows, dim in zip(origins, self.rows, self.dims, strict=True):
            vector = dim * self.dtype.itemsize
            for row in range(rows):
                start = origin + (row * total + first) * vector
                yield start, start + tokens * vector

    def _sizes(self, tokens: int) -> tuple[int, int]:
        size = self.batch * tokens * self.dtype.itemsize
        return self.heads[0] * self.dims[0] * size, self.heads[1] * self.dims[1] * size


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
