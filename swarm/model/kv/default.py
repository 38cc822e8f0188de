"""A model whose `generate` makes its own KV cache, as `kv=` of the loading functions chose."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

from moehive.protocol.errors import ConfigError
from moehive.swarm.model.mixing import M, mix_in

from .cache import kv_cache
from .options import KvMode, KvOptions

_OPTIONS: Final = "moehive_kv"  # the attribute of a model


def use_kv(model: M, kv: KvMode | KvOptions) -> M:
    """Let `model.generate` keep keys and values as `kv` says, with a new cache for each call; the same model.

    A call that brings its own `past_key_values` keeps it; calls of the model itself, not of `generate`, are left alone.
    Raises UnsupportedModel for a model that cannot do it.
    """
    options = kv if isinstance(kv, KvOptions) else KvOptions(kv)
    if options.mode != "full":
        kv_cache(model, options)  # refused here, not at the first prompt
    setattr(model, _OPTIONS, options)
    return mix_in(model, _Generates)


class _Generates:
    """What `use_kv` puts before a model's class."""

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `generate`. Raises also what the cache raises."""
        options: KvOptions = getattr(self, _OPTIONS)
        with ExitStack() as failing:  # whoever keeps an error, as a notebook does, keeps no cache by it
            if (
                options.mode != "full"
                and kwargs.get("past_key_values") is None
                and kwargs.get("use_cache") is not False
            ):
                kwargs |= self._own_cache(options, kwargs, inputs if inputs is not None else kwargs.get("input_ids"))
                failing.callback(kwargs["past_key_values"].close)
            output = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            failing.pop_all()
        return output

    def _own_cache(self, options: KvOptions, kwargs: dict[str, Any], prompt: Any) -> dict[str, Any]:
        settings = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        other = kwargs.get("cache_implementation") or settings.cache_implementation
        if other is not None:
            raise ConfigError(
                f"this model keeps its KV cache as {options.mode}: leave cache_implementation={other!r} out"
            )
        chosen: dict[str, Any] = {"past_key_values": kv_cache(self, options)}  # type: ignore[arg-type]
        # Without a prompt of token ids, transformers does not cut it into chunks.
        if prompt is not None and options.chunk is not None and prompt.shape[1] > options.chunk:
            chosen["prefill_chunk_size"] = kwargs.get("prefill_chunk_size") or options.chunk
        return chosen
