"""The transformers cache: what attention gets and what `generate` makes of it, bit for bit, for every family."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import DISTINCT, build_config, build_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, FalconH1Config

from moehive.protocol.errors import BudgetTooSmall, ConfigError, UnsupportedModel
from moehive.swarm.model.kv.cache import SpilledCache, kv_cache
from moehive.swarm.model.kv.options import KvMode

STEPS = 8


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    """Token ids [2, 60]."""
    return torch.randint(3, 250, (2, 60), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits_of(model: Any, prompt: Tensor, cache: Any) -> list[Tensor]:
    """Of a prefill in chunks of different lengths and of greedy steps."""
    seen = []
    for chunk in prompt.split([33, 17, prompt.shape[1] - 50], 1):
        seen.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    for _ in range(STEPS):
        token = seen[-1][:, -1:].argmax(-1)
        seen.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return seen


def full(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def small(model: Any, options: Any, prompt: Tensor, mode: KvMode = "spill", **more: Any) -> SpilledCache:
    """A cache whose budget is the least that works, or close above it, and that looks ahead where it can."""
    probe = kv_cache(model, options(mode, budget=1, **more), max_tokens=prompt.shape[1] + STEPS)
    try:
        with torch.inference_mode():
            model(input_ids=prompt[:, :1], past_key_values=probe, use_cache=True)
        budget = 1 << 20  # nothing spills in this model
    except BudgetTooSmall as error:
        budget = error.needed + error.needed // 3
    cache = kv_cache(model, options(mode, budget=budget, **more), max_tokens=prompt.shape[1] + STEPS)
    cache._engine.workspace.worthwhile = 0.0
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", DISTINCT)
def test_equal_to_the_full_cache_bit_for_bit(options: Any, prompt: Tensor, family: str, dtype: str) -> None:
    model = build_model(family, dtype)
    wanted = logits_of(model, prompt, full(model))
    for mode, more in (("spill", {}), ("spill", {"host": 9000}), ("window", {"window": 16})):
        cache = small(model, options, prompt, mode, **more)
        found = logits_of(model, prompt, cache)
        assert [torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)] == [True] * len(wanted)
        stats = cache.stats()
        assert stats.memory_peak <= stats.budget
        if family != "phimoe":  # all of its layers have a sliding window
            assert stats.layers
            assert stats.full_bytes
            assert stats.spilled_blocks
            assert stats.reloaded_bytes
        cache.close()


def generate(model: Any, prompt: Tensor, cache: Any, **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, past_key_values=cache, **arguments
    )
    assert isinstance(tokens, Tensor)
    return tokens


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "prefill_chunk_size": 16},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 4},
    ],
    ids=["greedy", "sampling", "chunks", "beams", "sequences", "assisted"],
)
def test_generate_makes_the_same_tokens(options: Any, prompt: Tensor, family: str, arguments: dict[str, Any]) -> None:
    model = build_model(family, "float32")
    model.generation_config.eos_token_id = -1  # which no token is; assisted decoding wants one
    if "prompt_lookup_num_tokens" in arguments:
        if family == "qwen3_next":
            pytest.skip("transformers does not roll back linear attention")
        prompt = prompt[:1, :20].repeat(1, 3)
    wanted = generate(model, prompt, None, **arguments)
    with kv_cache(model, options(budget=1 << 17)) as cache:
        found = generate(model, prompt, cache, **arguments)
        assert cache.stats().full_bytes
    assert torch.equal(found, wanted)


def test_a_prompt_with_padding(options: Any, prompt: Tensor) -> None:
    model = build_model("qwen3_moe", "float32")
    mask = torch.ones_like(prompt)
    mask[1, :23] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    cache = small(model, options, prompt)
    assert torch.equal(model.generate(prompt, **arguments, past_key_values=cache), model.generate(prompt, **arguments))
    cache.close()


def test_a_conversation_goes_on_and_steps_back(options: Any, prompt: Tensor) -> None:
    model = build_model("gpt_oss", "float32", sliding_window=128)  # which the conversation does not reach
    ours, theirs = kv_cache(model, options(budget=50_000)), full(model)
    for cache in (ours, theirs):
        first = generate(model, prompt[:, :40], cache, do_sample=False)
        second = generate(model, torch.cat([first, prompt[:, :9]], 1), cache, do_sample=False)
        cache.crop(-21)
        third = torch.cat([second[:, : cache.get_seq_length()], prompt[:, 9:20]], 1)
        last = generate(model, third, cache, do_sample=False)
        if cache is ours:
            found = (first, second, third, last)
    assert all(torch.equal(a, b) for a, b in zip(found, (first, second, third, last), strict=True))
    assert ours.get_seq_length() == theirs.get_seq_length()
    ours.close()


def test_it_can_be_reset_and_used_for_another_batch(options: Any, prompt: Tensor) -> None:
    model = build_model("mixtral", "float32")
    cache = small(model, options, prompt)
    for one in (prompt, prompt[:1], prompt.flip(1)):
        wanted = logits_of(model, one, full(model))
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model, one, cache), wanted, strict=True))
        cache.reset()  # type: ignore[no-untyped-call]
        assert cache.get_seq_length() == 0
    cache.close()


def test_sequences_are_repeated_and_selected(options: Any, prompt: Tensor) -> None:
    model = build_model("mixtral", "float32")
    ours, theirs = kv_cache(model, options(budget=1 << 18, host=9000)), full(model)
    for cache in (ours, theirs):
        with torch.inference_mode():
            model(input_ids=prompt[:, :43], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(2)
            model(input_ids=prompt[:1, 43:50].repeat(4, 1), past_key_values=cache, use_cache=True)
            cache.batch_select_indices(torch.tensor([3, 1]))
            last = model(input_ids=prompt[:, 50:], past_key_values=cache, use_cache=True).logits
        if cache is ours:
            found = last
    assert torch.equal(found, last)


def test_a_cache_that_nobody_needs_any_more_is_gone_at_once(options: Any, prompt: Tensor) -> None:
    """With its files, and without the garbage collector: a budget is for what is in use."""
    model = build_model("mixtral", "float32")
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        cache = small(model, options, prompt)
        logits_of(model, prompt, cache)
        assert len(list(Path("/proc/self/fd").iterdir())) > before
        cache._engine.workspace.settle()
        del cache
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [None, ValueError("somebody else's")])
def test_it_gives_everything_back_at_the_end_of_its_with(options: Any, prompt: Tensor, error: Exception | None) -> None:
    model = build_model("mixtral", "float32")
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with suppress(ValueError), small(model, options, prompt) as cache:
        logits_of(model, prompt, cache)
        assert cache.stats().disk_bytes > 0
        if error is not None:
            raise error
    stats = cache.stats()
    assert (stats.memory_bytes, stats.host_bytes, stats.disk_bytes) == (0, 0, 0)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_layers_that_do_not_grow_are_transformers_own(options: Any) -> None:
    kinds = {
        family: [type(layer).__name__ for layer in kv_cache(build_model(family), options()).layers]
        for family in ("gpt_oss", "qwen3_next", "deepseek_v32")
    }
    assert kinds == {
        "gpt_oss": ["DynamicSlidingWindowLayer", "SpilledLayer"] * 2,
        "qwen3_next": ["LinearAttentionLayer"] * 3 + ["SpilledLayer"],
        "deepseek_v32": ["SpilledIndexedLayer"] * 3,
    }


def test_an_index_beside_the_keys_stays_with_them(options: Any, prompt: Tensor) -> None:
    model = build_model("deepseek_v32", "float32")
    wanted = logits_of(model, prompt, full(model))
    cache = small(model, options, prompt)
    found = logits_of(model, prompt, cache)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert cache.stats().spilled_blocks
    cache.close()


class _Model:
    """All that making a cache needs of one."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device = torch.device("cpu")


def test_what_it_cannot_keep_is_refused(options: Any) -> None:
    with pytest.raises(UnsupportedModel, match="how to keep a LinearAttentionAndFullAttentionLayer"):
        kv_cache(_Model(FalconH1Config(num_hidden_layers=2)), options())  # type: ignore[arg-type]
    shared = build_config("mixtral")
    shared.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModel, match="read the keys of other layers"):
        kv_cache(_Model(shared), options())  # type: ignore[arg-type]


def test_it_is_for_inference_and_not_to_be_copied(options: Any, prompt: Tensor) -> None:
    model = build_model("mixtral", "float32")
    cache = kv_cache(model, options())
    with pytest.raises(ConfigError, match=r"torch\.no_grad"):
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(cache)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(cache)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "fast"}, "choose one of full, spill, window, fp8, int8"),
        ({"mode": "full"}, "leave past_key_values out"),
        ({"mode": "full", "budget": 1}, "a full KV cache has no budget"),
        ({"mode": "spill", "window": 5}, "mode window only"),
        ({"mode": "spill", "budget": 0}, "budget of a KV cache: 0 is less than 1"),
        ({"mode": "spill", "prefill_chunk": -1}, "-1 is less than 1"),
    ],
)
def test_options_that_contradict_themselves(arguments: dict[str, Any], said: str) -> None:
    mode = arguments.pop("mode")
    with pytest.raises(ConfigError, match=said):
        kv_cache(_Model(build_config("mixtral")), mode, **arguments)  # type: ignore[arg-type]


def test_options_are_given_once(options: Any) -> None:
    with pytest.raises(ConfigError, match="leave budget out"):
        kv_cache(_Model(build_config("mixtral")), options(), budget=5)  # type: ignore[arg-type]


def test_defaults_come_from_the_machine() -> None:
    stats = kv_cache(_Model(build_config("mixtral")), "spill").stats()  # type: ignore[arg-type]
    assert 0 < stats.budget < 1 << 50


def test_an_engine_of_another_device_is_refused(options: Any) -> None:
    model = AutoModelForCausalLM.from_config(build_config("mixtral"))
    cache = SpilledCache(model.config, options(), torch.device("meta"))
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="a KV cache on meta cannot keep"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
