"""The transformers cache: `DynamicCache` with other layers where a layer keeps every token."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, NoReturn, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer

from moehive.protocol.errors import ConfigError, UnsupportedModel

from .codecs import Codec, EightBitCodec, RawCodec
from .engine import KvEngine
from .options import KvMode, KvOptions, budgets_of
from .stats import KvStats

# Layers of transformers whose cache does not grow, or that have none; by name, as not every version has all of them.
_BOUNDED: Final = ("DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer")
_INDEXED: Final = "DynamicIndexedLayer"


def kv_cache(
    model: PreTrainedModel, kv: KvMode | KvOptions = "spill", *, max_tokens: int | None = None, **options: Any
) -> SpilledCache:
    """A cache for one generation with `model`, to be passed as `past_key_values` to `generate` or to the model.

        with kv_cache(model, "spill", budget=256 << 20) as cache:
            model.generate(**inputs, past_key_values=cache, prefill_chunk_size=512)

    `kv` and `options` are those of KvOptions; for `full`, which is transformers' own, no cache is needed. `max_tokens`
    is the length that the cache will reach, prompt and new tokens: where it is known, budgets that are too small are
    refused at the first token, and memory is laid out once. As any cache it may hold several turns of a conversation.
    It frees memory and disk when it is closed or collected.

    Raises ConfigError, UnsupportedModel. Using it raises BudgetTooSmall, DiskFull, StorageError.
    """
    chosen = kv if isinstance(kv, KvOptions) else KvOptions(kv, **options)
    if chosen is kv and options:
        raise ConfigError(f"KvOptions are complete: leave {', '.join(options)} out, or set them there")
    if chosen.mode == "full":
        raise ConfigError("a full KV cache is transformers' own: leave past_key_values out, or choose another mode")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise UnsupportedModel("layers of this model read the keys of other layers: leave its KV cache full")
    return SpilledCache(config, chosen, model.device, max_tokens)


class SpilledCache(DynamicCache):
    """See `kv_cache`. Layers with a bounded cache are transformers' own."""

    def __init__(self, config: Any, options: KvOptions, device: torch.device, max_tokens: int | None = None) -> None:
        super().__init__(config=config)
        self.options = options
        own = [index for index, layer in enumerate(self.layers) if _keeps_every_token(layer)]
        self._engine = KvEngine(len(own), _codec(options.mode), budgets_of(options, device, max_tokens), device)
        for number, index in enumerate(own):
            self.layers[index] = _spilled(self.layers[index])(self._engine, number)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads files: a graph has to break here
    def update(self, *arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """See Cache. What is returned is valid until the next layer's update."""
        keys, values = super().update(*arguments, **more)
        return keys, values

    def stats(self) -> KvStats:
        """What is where, and what it cost."""
        engine, times, counts = self._engine, self._engine.workspace.times, self._engine.store.counts
        own = [layer for layer in self.layers if isinstance(layer, SpilledLayer)]
        return KvStats(
            mode=self.options.mode,
            tokens=max((layer.get_seq_length() for layer in own), default=0),
            block_tokens=engine.block_tokens,
            layers=len(own),
            kept_layers=len(self.layers) - len(own),
            full_bytes=engine.full_bytes,
            budget=engine.device.limit,
            memory_bytes=engine.device.used,
            memory_peak=engine.device.peak,
            host_bytes=engine.host.used,
            host_peak=engine.host.peak,
            disk_bytes=engine.disk.used,
            disk_peak=engine.disk.peak,
            spilled_blocks=counts.spilled_blocks,
            written_bytes=counts.written_bytes,
            reloaded_bytes=counts.reloaded_bytes,
            reload_seconds=times.reload,
            wait_seconds=times.wait,
            expected=times.expected,
            unexpected=times.unexpected,
        )

    def close(self) -> None:
        """Forget everything; give back memory and disk. A closed cache may be used again, as an empty one."""
        with torch.inference_mode():  # transformers' layers are set to zero, which may be tensors made in it
            self.reset()  # type: ignore[no-untyped-call]
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ConfigError("a KV cache that spills cannot be copied: make another one and read the prompt again")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError("a KV cache that spills cannot be pickled")


class SpilledLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a `SpilledCache`; its keys and values [B, H, T, D] are in the engine's care."""

    is_croppable = True

    def __init__(self, engine: KvEngine, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._engine = engine
        self._number = number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See DynamicLayer; nothing is kept here."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, H, n, D]; all of them [B, H, T, D], valid until the next layer's update."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._engine.update(self._number, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens that are kept."""
        return self._engine.length(self._number)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -n tokens; a positive number is the length to keep, as in older transformers."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
        self._engine.truncate(self._number, max(0, keep))

    def reset(self) -> None:
        """Forget every token."""
        self.is_initialized = False  # first: older transformers zero the keys of an initialised layer, which has none
        super().reset()
        self._engine.reset(self._number)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams. Every stored block is written again: correct, and as slow as it sounds."""
        self._engine.take_rows(self._number, beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        layout = self._engine.layout(self._number)
        if layout is not None:
            self._engine.take_rows(self._number, torch.arange(layout.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        layout = self._engine.layout(self._number)
        if layout is not None:
            self._engine.take_rows(self._number, torch.arange(layout.batch)[indices.cpu()])

    def offload(self) -> None:
        """Nothing: the engine does."""

    def prefetch(self) -> None:
        """Nothing: the engine does."""


def _keeps_every_token(layer: Any) -> bool:
    """Whether a layer's cache grows with every token, in a way that we can keep; UnsupportedModel where we cannot."""
    name = type(layer).__name__
    if type(layer) is DynamicLayer or name == _INDEXED:
        return True
    if name in _BOUNDED:
        return False
    raise UnsupportedModel(f"a KV cache that spills does not know how to keep a {name}: leave this model's cache full")


def _spilled(layer: Any) -> type[SpilledLayer]:
    """The class that takes a layer's place; an indexed one keeps its small index in memory."""
    if type(layer).__name__ != _INDEXED:
        return SpilledLayer
    indexed = getattr(cache_utils, _INDEXED)

    # Its calls of super() come to SpilledLayer.
    class SpilledIndexedLayer(indexed, SpilledLayer):  # type: ignore[misc, valid-type, no-untyped-call]
        def __init__(self, engine: KvEngine, number: int) -> None:
            SpilledLayer.__init__(self, engine, number)
            self.indexer_keys = self.indexer_position_ids = None
            self.is_indexer_initialized = False

    return SpilledIndexedLayer


def _codec(mode: KvMode) -> Codec:
    if mode == "fp8":
        return EightBitCodec(torch.float8_e4m3fn)
    return EightBitCodec(torch.int8) if mode == "int8" else RawCodec()
