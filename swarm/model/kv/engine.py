"""The keys and values of all layers that spill: what is added, what attention gets, what is taken back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, ConfigError, DiskFull, StorageError, UnsupportedModel
from moehive.protocol.units import format_enough, format_size

from .assembly import Assembly
from .blocks import BlockStore
from .codecs import Codec
from .layout import KvLayout, Pair
from .memory import Account, BufferPool
from .options import KvBudgets
from .plan import KvFacts, KvPlan, block_length, divide, missing_on_disk
from .workspace import Wanted, Workspace

_GROWTH: Final = 16  # a slot that has to grow grows by at least this part of it


@dataclass(slots=True)
class _Layer:
    """One layer. Its tokens are in blocks of equal length, and the newest `length % block_tokens` in `tail`."""

    layout: KvLayout | None = None
    length: int = 0
    tail: Tensor | None = None  # [spaced(block_tokens)] uint8


class KvEngine:
    """For inference, from one thread at a time."""

    def __init__(self, layers: int, codec: Codec, budgets: KvBudgets, device: torch.device) -> None:
        self.device = Account(budgets.device)
        self.host = Account(budgets.host)
        self.disk = Account(budgets.disk)
        self._codec = codec
        self._budgets = budgets
        self.block_tokens = budgets.block_tokens or 0  # of a block; 0: not known before the first tokens
        self._buffers = BufferPool(self.device, device)  # of slots and tails
        self._host = BufferPool(self.host, torch.device("cpu"), pinned=device.type == "cuda")
        self.workspace = Workspace(self._buffers)
        self.store = BlockStore(layers, BufferPool(self.device, device), self._host, self.disk, budgets.directory)
        self._layers = [_Layer() for _ in range(layers)]
        self._facts: KvFacts | None = None  # that the current division was made for
        self._failed = False

    # --- what a cache layer calls ---------------------------------------------------------------------------------

    def update(self, index: int, keys: Tensor, values: Tensor) -> Pair:
        """Add keys and values [B, H, n, D] to a layer; all that it has [B, H, T, D], valid until the next call.

        Raises BudgetTooSmall, DiskFull, StorageError; ConfigError, UnsupportedModel for what cannot be kept here.
        """
        layer = self._layers[index]
        self.workspace.settle()
        layout = self._begin(layer, keys, values)
        new = keys.shape[2]
        total = layer.length + new
        self._fit(layout, total)
        buffer = self.workspace.open(Wanted(index, layer.length, total), self._put_together)
        everything = layout.spaced_views(buffer, total)
        for whole, added in zip(everything, (keys, values), strict=True):
            whole[:, :, layer.length :].copy_(added)
        self._failed = True
        self._add(index, layout, keys, values)
        self._failed = False
        self._look_ahead(index, new)
        return everything

    def length(self, index: int) -> int:
        """Tokens of a layer."""
        return self._layers[index].length

    def layout(self, index: int) -> KvLayout | None:
        """How a layer's tokens lie; None before the first."""
        return self._layers[index].layout

    @property
    def full_bytes(self) -> int:
        """Bytes of all keys and values as they came."""
        return sum(layer.layout.packed(layer.length) for layer in self._layers if layer.layout is not None)

    def truncate(self, index: int, length: int) -> None:
        """Keep a layer's `length` oldest tokens. Raises StorageError."""
        layer = self._layers[index]
        if layer.layout is None or length >= layer.length:
            return
        self.workspace.forget(index)
        blocks, rest = divmod(length, self.block_tokens)
        if rest and blocks < self.store.count(index):  # what was a full block becomes the newest tokens again
            layout, tail = layer.layout, self._tail(layer, layer.layout)
            self.store.look_at(index, blocks, lambda block: self._codec.decode(layout, block[None], *tail))
        self.store.truncate(index, blocks)
        layer.length = length

    def take_rows(self, index: int, rows: Tensor) -> None:
        """Let sequence i of the batch be what sequence rows[i] was: for beams, and to repeat or select sequences.

        Every block of the layer is read and written again. Raises BudgetTooSmall, DiskFull, StorageError.
        """
        layer = self._layers[index]
        old = layer.layout
        if old is None or layer.tail is None or rows.tolist() == list(range(old.batch)):
            return
        self.workspace.forget(index)
        rows = rows.to(layer.tail.device)
        newest = [part.index_select(0, rows) for part in old.spaced_views(layer.tail, self.block_tokens)]
        self._buffers.free(layer.tail)
        new = old.with_batch(len(rows))
        self._failed = True
        layer.layout, layer.tail = new, None
        self._fit(new, layer.length)
        for kept, taken in zip(self._tail(layer, new), newest, strict=True):
            kept.copy_(taken)

        def unpack(block: Tensor) -> Pair:
            keys, values = old.empty(self.block_tokens)
            self._codec.decode(old, block[None], keys, values)
            return keys.index_select(0, rows), values.index_select(0, rows)

        def pack(content: Pair, block: Tensor) -> None:
            self._codec.encode(new, *content, block)

        self.store.rewrite(index, self._codec.nbytes(new, self.block_tokens), unpack, pack)
        self._failed = False

    def reset(self, index: int) -> None:
        """Forget a layer's tokens, and of how many sequences they were."""
        layer = self._layers[index]
        self.workspace.forget(index)
        self.store.truncate(index, 0)
        if layer.tail is not None:
            self._buffers.free(layer.tail)
        self._layers[index] = _Layer()
        if all(layer.layout is None for layer in self._layers):
            self.workspace.resize(0, 0)
            self._facts, self._failed, self.block_tokens = None, False, self._budgets.block_tokens or 0

    def close(self) -> None:
        """Give back memory and disk."""
        for index in range(len(self._layers)):
            self.reset(index)
        self.workspace.close()
        self.store.close()

    # --- parts ----------------------------------------------------------------------------------------------------

    def _begin(self, layer: _Layer, keys: Tensor, values: Tensor) -> KvLayout:
        """The layer's layout, that of its first tokens; what cannot be kept is refused before anything changes."""
        if self._failed:
            raise StorageError("this KV cache met an error before: reset it, or make a new one")
        if keys.requires_grad or values.requires_grad:
            raise ConfigError("this KV cache is for inference: call the model under torch.no_grad()")
        found = KvLayout.of(keys, values)
        if layer.layout is None:
            self.block_tokens = self.block_tokens or block_length(found.packed(1), len(self._layers), self.device.limit)
            if found.device != self._buffers.device or values.dtype != keys.dtype or not keys.is_floating_point():
                raise UnsupportedModel(
                    f"a KV cache on {self._buffers.device} cannot keep keys of {keys.dtype} and values of "
                    f"{values.dtype} on {found.device}"
                )
            needed = self._codec.nbytes(found, self.block_tokens)
            if self._host.device != found.device and self.host.limit < needed:
                raise BudgetTooSmall("host memory of a KV cache", budget=self.host.limit, needed=needed)
            layer.layout = found
        elif found != layer.layout:
            raise ConfigError(f"this KV cache holds {layer.layout}, not {found}: reset it, or make a new one")
        return layer.layout

    def _fit(self, layout: KvLayout, total: int) -> None:
        """Divide the working memory anew where `total` tokens of `layout` do not fit into what there is."""
        tail, block = layout.spaced(self.block_tokens), self._codec.nbytes(layout, self.block_tokens)
        facts = self._facts
        if facts is not None:
            if layout.spaced(total) <= self.workspace.capacity and tail <= facts.tail and block <= facts.block:
                return
            tail, block = max(tail, facts.tail), max(block, facts.block)
        planned, window = self._budgets.max_tokens or 0, self._budgets.window
        tokens = max(total, planned)
        roomy = planned if total <= planned else total + max(self.block_tokens, total // _GROWTH)
        facts = KvFacts(
            budget=self.device.limit,
            layers=len(self._layers),
            slot=layout.spaced(tokens),
            roomy_slot=layout.spaced(roomy),
            tail=tail,
            block=block,
            tokens=tokens,
            window=None if window is None else -(-min(window, roomy) // self.block_tokens),
        )
        plan = divide(facts)
        if planned:
            self._check_lower_tiers(facts, plan)
        self.store.follow(plan)
        self.workspace.resize(plan.slots, plan.slot)
        self._facts = facts

    def _check_lower_tiers(self, facts: KvFacts, plan: KvPlan) -> None:
        """Refuse what would fail later, when the length that will be reached is known."""
        missing = missing_on_disk(facts, plan, self.block_tokens, self.host.limit + self.disk.limit)
        if missing:
            needed = self.disk.limit + missing
            raise DiskFull(
                f"a KV cache of {facts.tokens} tokens needs {format_size(missing)} more than its budgets; raise that "
                f"of the disk (--kv-disk) to {format_enough(needed)} ({needed} bytes)"
            )

    def _add(self, index: int, layout: KvLayout, keys: Tensor, values: Tensor) -> None:
        """Append to the layer's newest tokens; each time they are a block full, store it."""
        layer, done, new = self._layers[index], 0, keys.shape[2]
        tail = self._tail(layer, layout)
        while done < new:
            filled = layer.length % self.block_tokens
            count = min(self.block_tokens - filled, new - done)
            for kept, added in zip(tail, (keys, values), strict=True):
                kept[:, :, filled : filled + count].copy_(added[:, :, done : done + count])
            done, layer.length = done + count, layer.length + count
            if layer.length % self.block_tokens == 0:
                nbytes = self._codec.nbytes(layout, self.block_tokens)
                self.store.append(index, nbytes, partial(self._codec.encode, layout, *tail))

    def _put_together(self, wanted: Wanted, buffer: Tensor) -> None:
        """Fill a slot with a layer's stored tokens. Also called from the workspace's thread, while nothing changes."""
        layer = self._layers[wanted.layer]
        assert layer.layout is not None
        assembly = Assembly(layer.layout, self._codec, self.block_tokens, buffer, wanted.total)
        self.store.load(wanted.layer, assembly)
        rest = wanted.length % self.block_tokens
        if rest:
            assembly.put_tail(self._tail(layer, layer.layout), wanted.length - rest, rest)

    def _look_ahead(self, index: int, new: int) -> None:
        """Fetch the layer that comes next, which adds as many tokens as this one did unless the step is over."""
        following = (index + 1) % len(self._layers)
        layer = self._layers[following]
        if not self.workspace.looks_ahead or layer.layout is None or layer.length == 0:
            return
        total = layer.length + new
        if layer.layout.spaced(total) <= self.workspace.capacity:
            self.workspace.fetch_ahead(Wanted(following, layer.length, total), self._put_together)

    def _tail(self, layer: _Layer, layout: KvLayout) -> Pair:
        """The newest tokens, [B, H, block_tokens, D] each, of which `length % block_tokens` are there."""
        if layer.tail is None:
            layer.tail = self._buffers.take(layout.spaced(self.block_tokens))
        return layout.spaced_views(layer.tail, self.block_tokens)
