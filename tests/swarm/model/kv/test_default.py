"""A model whose `generate` makes its own KV cache."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build_model
from transformers import DynamicCache, GenerationConfig

import moehive.swarm
from moehive.protocol.errors import ConfigError, DiskFull
from moehive.swarm.model.kv.cache import SpilledCache
from moehive.swarm.model.kv.default import use_kv

PROMPT = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(7))


def generate(model: Any, *arguments: Any, **more: Any) -> Any:
    settings = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 6, "do_sample": False}
    return model.generate(*arguments, **(settings | more))


def cache_of(model: Any, *arguments: Any, **more: Any) -> Any:
    return generate(model, *arguments, return_dict_in_generate=True, **more).past_key_values


def test_generate_makes_a_cache_of_its_own_for_each_call(options: Any) -> None:
    model = build_model("mixtral", "float32")
    kind, wanted = type(model), generate(model, PROMPT)
    assert use_kv(model, options()) is model
    assert isinstance(model, kind)
    assert torch.equal(generate(model, PROMPT), wanted)
    assert torch.equal(generate(model, input_ids=PROMPT), wanted)
    caches = [cache_of(model, PROMPT) for _ in range(2)]
    assert all(isinstance(cache, SpilledCache) for cache in caches)
    assert caches[0] is not caches[1]


def test_long_prompts_are_read_in_chunks(options: Any) -> None:
    model, lengths = build_model("mixtral", "float32"), []
    model.model.register_forward_pre_hook(
        lambda _, args, more: lengths.append(more["input_ids"].shape[1]), with_kwargs=True
    )
    use_kv(model, options(prefill_chunk=20))
    generate(model, PROMPT)
    generate(model, PROMPT, prefill_chunk_size=25)
    generate(model, PROMPT[:, :20], attention_mask=torch.ones_like(PROMPT[:, :20]), max_new_tokens=1)
    use_kv(model, "full")
    generate(model, PROMPT, max_new_tokens=1)
    assert [length for length in lengths if length > 1] == [20, 10, 25, 5, 20, 30]


def test_what_the_caller_brings_counts(options: Any) -> None:
    model = use_kv(build_model("mixtral", "float32"), options())
    own = DynamicCache(config=model.config)
    assert cache_of(model, PROMPT, past_key_values=own) is own
    assert cache_of(model, PROMPT, use_cache=False) is None
    use_kv(model, "full")
    assert not isinstance(cache_of(model, PROMPT), SpilledCache)


def test_who_keeps_the_error_of_a_generation_keeps_no_file_by_it(options: Any) -> None:
    """As a notebook keeps its last one. Otherwise the disk that was full would stay so."""
    model = use_kv(build_model("mixtral", "float32"), options(budget=30_000, disk=20_480))
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    files = []
    with pytest.raises(DiskFull) as caught:
        generate(
            model, PROMPT, max_new_tokens=60, streamer=_Streamer(lambda: files.append(os.listdir("/proc/self/fd")))
        )
    assert set(files[-1]) - before, "nothing was on disk"
    assert set(os.listdir("/proc/self/fd")) <= before
    assert "disk budget" in str(caught.value)


class _Streamer:
    """Calls `look` at each token."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.put = lambda _: look()
        self.end = look


def test_a_static_cache_contradicts_it(options: Any) -> None:
    model = use_kv(build_model("mixtral", "float32"), options())
    with pytest.raises(ConfigError, match="leave cache_implementation='static' out"):
        generate(model, PROMPT, cache_implementation="static")
    with pytest.raises(ConfigError, match="leave cache_implementation='static' out"):
        generate(model, PROMPT, generation_config=GenerationConfig(cache_implementation="static"))


def test_a_model_is_freed_when_it_is_dropped(options: Any) -> None:
    model = build_model("mixtral", "float32")
    gc.collect()
    before = weakref.ref(model)
    gc.disable()
    try:
        use_kv(model, options())
        generate(model, PROMPT)
        del model
        assert before() is None
    finally:
        gc.enable()


def test_loading_takes_the_mode(converted: Path, options: Any) -> None:
    plain, _ = moehive.swarm.open_local(converted, dtype=torch.float32)
    model, _ = moehive.swarm.open_local(converted, dtype=torch.float32, kv=options(budget=20_000))
    assert torch.equal(generate(model, PROMPT), generate(plain, PROMPT))
    assert cache_of(model, PROMPT).stats().spilled_blocks
