"""What goes over the wire, letter by letter."""

from __future__ import annotations

import json

import pytest

from moehive.node.api.errors import ApiError, of_failure
from moehive.node.api.events import DONE, AnswerForm, Usage, failure
from moehive.protocol.errors import BudgetTooSmall, ConfigError, ExpertUnavailable, PeerUnreachable

CHAT = AnswerForm("chat", "chatcmpl-1", "m", 5)
TEXT = AnswerForm("text", "cmpl-1", "m", 5)
USAGE = Usage(3, 2, 1)


def test_a_whole_chat_answer():
    assert CHAT.whole("hi", "stop", USAGE) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_a_whole_text():
    body = TEXT.whole("hi", "length", USAGE)

    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "length"}]


def test_a_stream_of_a_chat():
    head = '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m",'
    head += '"choices":[{"index":0,"logprobs":null,'
    assert CHAT.first() == f'data: {head}"finish_reason":null,"delta":{{"role":"assistant","content":""}}}}]}}\n\n'
    assert CHAT.piece("a\n€") == f'data: {head}"finish_reason":null,"delta":{{"content":"a\\n\\u20ac"}}}}]}}\n\n'
    assert CHAT.last("stop", USAGE) == f'data: {head}"finish_reason":"stop","delta":{{}}}}]}}\n\ndata: [DONE]\n\n'


def test_a_stream_of_a_text():
    head = '{"id":"cmpl-1","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"logprobs":null,'
    assert TEXT.first() == ""
    assert TEXT.piece("a") == f'data: {head}"finish_reason":null,"text":"a"}}]}}\n\n'
    assert TEXT.last("length", USAGE) == f'data: {head}"finish_reason":"length","text":""}}]}}\n\n' + DONE


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_usage_comes_last_and_only_where_it_was_asked_for(kind):
    form = AnswerForm(kind, "1", "m", 5, with_usage=True)
    *_, usage, done, rest = form.last("stop", USAGE).split("\n\n")

    assert json.loads(usage.removeprefix("data: "))["choices"] == []
    assert json.loads(usage.removeprefix("data: "))["usage"] == USAGE.body
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(form.piece("x").removeprefix("data: "))["usage"] is None
    assert "usage" not in CHAT.piece("x")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ExpertUnavailable(3, [1]), 503, "experts_unavailable"),
        (PeerUnreachable("gone"), 503, "experts_unavailable"),
        (ConfigError("no"), 400, None),
        (BudgetTooSmall("x", budget=1, needed=2), 500, "BudgetTooSmall"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
def test_failures_are_told_with_the_right_status(error, status, code):
    told = of_failure(error)

    assert (told.status, told.code) == (status, code)
    assert "secret" not in told.message


def test_a_stream_that_cannot_go_on_ends_with_the_error():
    assert failure(ApiError(503, "gone", kind="server_error", code="x")) == (
        'data: {"error":{"message":"gone","type":"server_error","param":null,"code":"x"}}\n\n'
    )
