"""What a request may say: everything is honoured, harmless, or refused by name."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moehive.node.api.errors import ApiError
from moehive.node.api.schema import Message, Wishes, parse_body, parse_chat, parse_completion

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hello"}


def refusal(parse: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body)
    return caught.value


def test_the_least_that_can_be_asked():
    assert parse_chat(CHAT).wishes == Wishes("m")
    assert parse_chat(CHAT).messages == (Message("user", "hello"),)
    assert parse_completion(TEXT).prompt == "hello"
    assert parse_completion(TEXT).wishes == Wishes("m", usual_tokens=16)


def test_everything_that_is_honoured():
    wishes = {"max_completion_tokens": 5, "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": -1, "stop": "x"}
    wishes |= {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}

    assert parse_chat(CHAT | wishes).wishes == Wishes("m", 5, 1.0, 0.5, 3, -1, ("x",), True, True)
    assert parse_chat(CHAT | {"max_tokens": 5, "max_completion_tokens": 5}).wishes.max_tokens == 5
    assert parse_completion(TEXT | {"max_tokens": 5, "stop": ["a", "b"]}).wishes == Wishes(
        "m", 5, stop=("a", "b"), usual_tokens=16
    )


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x"},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "frequency_penalty": 0.0, "presence_penalty": 0},
        {"logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"},
        {"modalities": ["text"], "parallel_tool_calls": True},
        dict.fromkeys(("n", "tools", "audio", "max_tokens", "temperature", "stop", "stream", "seed")),
    ],
)
def test_what_says_nothing_about_the_text_is_accepted(harmless):
    assert parse_chat(CHAT | harmless) == parse_chat(CHAT)


@pytest.mark.parametrize(
    "wish",
    [
        {"n": 2}, {"n": True}, {"logprobs": True}, {"logprobs": 0}, {"logit_bias": {"5": 1}}, {"store": True},
        {"response_format": {"type": "json_object"}}, {"tools": [{"type": "function"}]}, {"tool_choice": "required"},
        {"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"reasoning_effort": "low"}, {"prediction": {}},
        {"audio": {}}, {"modalities": ["text", "audio"]}, {"functions": [{}]}, {"service_tier": "priority"},
        {"repetition_penalty": 1.1}, {"min_p": 0.1}, {"temprature": 1}, {"echo": False},
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(wish):
    error = refusal(parse_chat, CHAT | wish)

    assert error.status == 400
    assert error.param in wish
    assert error.param in error.message
    assert error.code in ("unsupported_parameter", "unknown_parameter")


@pytest.mark.parametrize("wish", [{"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"logprobs": 0}, {"tools": []}])
def test_completions_have_parameters_of_their_own(wish):
    assert refusal(parse_completion, TEXT | wish).param in wish


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_values_that_are_none_are_refused_by_name(wish, param):
    error = refusal(parse_chat, CHAT | wish)

    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": ["user"], "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "me"}, "messages[0].name"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "detail": 1}]}, "messages[0].content[0].detail"),
    ],
)
def test_messages_that_cannot_be_read_whole_are_refused(message, param):
    assert refusal(parse_chat, CHAT | {"messages": [message]}).param == param


def test_messages_as_clients_write_them():
    answer = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": None}
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    body = CHAT | {"messages": [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}, answer]}

    assert parse_chat(body).messages == (
        Message("system", "be"), Message("user", "one, two"), Message("assistant", "yes"),
    )  # fmt: skip


@pytest.mark.parametrize(("prompt", "read"), [(["hello"], "hello"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2)), ("", "")])
def test_prompts_may_be_tokens_and_lists_of_one(prompt, read):
    assert parse_completion(TEXT | {"prompt": prompt}).prompt == read


@pytest.mark.parametrize("prompt", [None, ["a", "b"], [[1], [2]], [1, "a"], [-1], [True], [], [[]], {"a": 1}, "\udfff"])
def test_prompts_that_are_none(prompt):
    assert refusal(parse_completion, TEXT | {"prompt": prompt}).param in ("prompt", None)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"\xff", b'{"temperature": NaN}', b'{"\\ud800": 1}', b"[" * 100_000,
     b'{"seed": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_no_json_objects(body):
    assert refusal(parse_body, body).status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "stop",
        "stream",
        "stream_options",
        "n",
        "logit_bias",
        "max_tokens",
        "tools",
        "seed",
    ]
) | st.text(max_size=8)


@given(st.dictionaries(NAMES, JSON))
@example({"messages": [{"role": {}, "content": [[]]}], "model": "m"})
def test_anything_else_is_an_api_error(body: dict[str, Any]):
    for parse in (parse_chat, parse_completion):
        with suppress(ApiError):
            assert parse(body).wishes.model
