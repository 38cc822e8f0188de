"""A model that says how many tokens each `generate` is about to compute."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.families import build_model
from transformers import DynamicCache, GenerationConfig

from moehive.swarm.model.horizon import tell_horizon
from moehive.swarm.model.kv.default import use_kv

PROMPT = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(7))
MASK = torch.ones_like(PROMPT)


class Told:
    """What generations said, and how many of them go on."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.going_on = 0

    @contextmanager
    def generating(self, tokens: int) -> Iterator[None]:
        self.tokens.append(tokens)
        self.going_on += 1
        try:
            yield
        finally:
            self.going_on -= 1


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def model(told: Told) -> Any:
    """Tells `told`; counts the tokens that it computes in its attribute `computed`."""
    made: Any = tell_horizon(build_model("mixtral", "float32"), told.generating)
    made.generation_config.eos_token_id = None
    made.computed = 0

    def count(_: Any, args: Any, more: dict[str, Any]) -> None:
        given = more.get("input_ids")
        made.computed += (more["inputs_embeds"][..., 0] if given is None else given).numel()
        assert told.going_on == 1

    made.model.register_forward_pre_hook(count, with_kwargs=True)
    return made


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize(
    ("more", "passes"),
    [
        ({"max_new_tokens": 5}, 2),
        ({"generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=0)}, 2),
        ({"generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=0), "max_new_tokens": 6}, 2),
        ({"max_length": 12}, 2),
        ({}, 2),  # transformers' own 20
        ({"max_new_tokens": 3, "num_beams": 2}, 4),
        ({"max_new_tokens": 3, "num_return_sequences": 3, "do_sample": True}, 6),
    ],
)
def test_as_many_tokens_are_said_as_are_computed(model: Any, told: Told, more: dict[str, Any], passes: int) -> None:
    model.generate(PROMPT, attention_mask=MASK, **more)
    assert told.tokens == [model.computed + passes]  # the last tokens are not computed with
    assert told.going_on == 0


def test_prompts_come_under_several_names(model: Any, told: Told) -> None:
    model.generate(input_ids=PROMPT, attention_mask=MASK, max_new_tokens=5)
    embedded = model.get_input_embeddings()(PROMPT)
    model.generate(inputs_embeds=embedded, attention_mask=MASK, max_new_tokens=5)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    model.generate(PROMPT, config, attention_mask=MASK)
    assert told.tokens == [2 * (9 + 5)] * 3


def test_what_is_in_the_cache_is_not_computed_again(model: Any, told: Told) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model.forward(input_ids=PROMPT[:, :6], past_key_values=cache)  # past the hook, which would count it
    model.generate(PROMPT, attention_mask=MASK, past_key_values=cache, max_new_tokens=5)
    assert told.tokens == [2 * (3 + 5)] == [model.computed + 2]


def test_a_generation_that_fails_is_over(model: Any, told: Told) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(PROMPT, attention_mask=MASK, max_new_tokens=5)
    assert told.going_on == 0


def test_it_goes_with_a_kv_cache_of_its_own(model: Any, told: Told) -> None:
    kind = type(model)
    wanted = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=5)
    assert tell_horizon(use_kv(model, "spill"), told.generating) is model
    assert isinstance(model, kind)
    assert torch.equal(model.generate(PROMPT, attention_mask=MASK, max_new_tokens=5), wanted)
    assert told.tokens == [28, 28]


def test_a_model_is_freed_when_it_is_dropped(told: Told) -> None:
    model = build_model("mixtral", "float32")
    gc.collect()
    before = weakref.ref(model)
    gc.disable()
    try:
        tell_horizon(model, told.generating)
        model.generate(PROMPT, attention_mask=MASK, max_new_tokens=2)
        del model
        assert before() is None
    finally:
        gc.enable()
