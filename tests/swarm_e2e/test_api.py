"""`moehive serve` as programs use it: OpenAI's own client against a real process, with and without a swarm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from support.checkpoints import Checkpoints
from support.processes import NodeProcess, Nodes, eventually

from moehive.swarm import open_local
from moehive.swarm.text.generation import Generated, continue_text
from moehive.swarm.text.sampling import Sampling

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"
TOKENS = 24
HERE = ("--port", "0", "--json", "--threads", "1", "--dtype", "float32", "--log-format", "json", "--name", "tiny")
SAY: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What light is this?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


def client_of(process: NodeProcess, key: str = "none is needed") -> OpenAI:
    return OpenAI(base_url=process.ready()["url"], api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def own() -> Iterator[Nodes]:
    """What starts the processes of this module, whose server outlives each test."""
    with Nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(own: Nodes, checkpoints: Checkpoints) -> Iterator[NodeProcess]:
    """A server without a swarm, for all tests that leave it as it was."""
    process = own.run("serve", "--model", checkpoints.converted(FAMILY), *HERE)
    process.ready()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> tuple[Generated, Generated]:
    """What `moehive generate` makes of the question: as a text, and with --chat."""
    model, tokenizer = open_local(checkpoints.converted(FAMILY), dtype=torch.float32)
    sampling = Sampling(TOKENS, 0, temperature=0)
    text, chat = (
        continue_text(model, tokenizer, SAY[1]["content"], sampling, lambda _: None, chat=chat)
        for chat in (False, True)
    )
    return text, chat


def test_chat_and_completions_have_the_tokens_of_the_command_line(
    served: NodeProcess, wanted: tuple[Generated, Generated]
) -> None:
    with client_of(served) as client:
        text = client.completions.create(prompt=SAY[1]["content"], max_tokens=TOKENS, **GREEDY)
        chat = client.chat.completions.create(messages=SAY[1:], max_completion_tokens=TOKENS, **GREEDY)

    assert [text.choices[0].text, chat.choices[0].message.content] == [one.text for one in wanted]
    for answer, one in zip((text, chat), wanted, strict=True):
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (TOKENS, one.prompt_tokens)
        assert answer.choices[0].finish_reason == "length"


def test_streams_are_the_same_answer_in_pieces(served: NodeProcess) -> None:
    with client_of(served) as client:
        whole = client.chat.completions.create(messages=SAY, max_tokens=TOKENS, **GREEDY)
        usage = {"include_usage": True}
        chunks = [
            *client.chat.completions.create(
                messages=SAY, max_tokens=TOKENS, stream=True, stream_options=usage, **GREEDY
            )
        ]
        texts = [*client.completions.create(prompt="light", max_tokens=9, stream=True, **GREEDY)]
        text = client.completions.create(prompt="light", max_tokens=9, **GREEDY)

    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert sum(map(bool, parts)) > 6
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert "".join(part.choices[0].text for part in texts) == text.choices[0].text


def test_what_is_served_is_counted(served: NodeProcess) -> None:
    def seen(text: str) -> dict[str, float]:
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }

    url = served.ready()["url"].removesuffix("/v1") + "/metrics"
    with client_of(served) as client:
        before = seen(httpx.get(url, timeout=60).raise_for_status().text)
        client.completions.create(prompt=[97, 98], max_tokens=3, **GREEDY)
        text = httpx.get(url, timeout=60).raise_for_status().text
    after = seen(text)
    for name, more in (("completion_tokens_total", 3), ("prompt_tokens_total", 2), ("first_text_seconds_count", 1)):
        assert after[f"moehive_served_{name}"] - before[f"moehive_served_{name}"] == more
    assert 'moehive_tier_hits_total{layer="0",tier="ram"}' in text


def test_wishes_are_granted(served: NodeProcess) -> None:
    with client_of(served) as client:

        def say(**wishes: Any) -> tuple[str, str]:
            choice = client.completions.create(
                prompt="light", max_tokens=TOKENS, **({"model": "tiny"} | wishes)
            ).choices[0]
            return choice.text, choice.finish_reason

        greedy, _ = say(temperature=0)
        stop = greedy[3:5]
        assert say(temperature=0, stop=[stop, "never"]) == (greedy[: greedy.index(stop)], "stop")
        assert say(temperature=1.5, top_p=1e-6)[0] == greedy
        assert say(temperature=2, seed=5) == say(temperature=2, seed=5)
        assert len({say(temperature=2)[0] for _ in range(3)}) > 1
        tokens = client.completions.create(prompt=[97, 98], max_tokens=2, **GREEDY)
        assert tokens.usage is not None
        assert tokens.usage.prompt_tokens == 2


def test_a_conversation_goes_on_where_it_was(served: NodeProcess) -> None:
    with client_of(served) as client:
        first = client.chat.completions.create(messages=SAY, max_tokens=4, stop="\n", **GREEDY)
        messages = [*SAY, {"role": "assistant", "content": first.choices[0].message.content}]
        messages.append({"role": "user", "content": "Go on."})
        again = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
        client.completions.create(prompt="Another text.", max_tokens=1, **GREEDY)
        fresh = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)

    assert first.usage is not None
    assert again.usage is not None
    assert fresh.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert fresh.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 1
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert again.choices[0].message.content == fresh.choices[0].message.content


def test_mistakes_are_the_clients_own_exceptions(served: NodeProcess) -> None:
    with client_of(served) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "moehive"
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
            client.chat.completions.create(model="gpt-5", messages=SAY)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
            client.completions.create(prompt="x" * 600, **GREEDY)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="n is not supported") as refused:
            client.chat.completions.create(messages=SAY, n=2, **GREEDY)
        assert refused.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(
                messages=SAY, tools=[{"type": "function", "function": {"name": "f"}}], **GREEDY
            )


def test_a_client_that_leaves_its_stream_leaves_the_model_to_others(served: NodeProcess) -> None:
    with client_of(served) as client:
        with client.completions.create(prompt="light", max_tokens=500, stream=True, **GREEDY) as stream:
            next(iter(stream))
        assert client.completions.create(prompt="light", max_tokens=1, **GREEDY).choices[0].finish_reason == "length"


def test_the_log_says_what_was_done_and_not_what_was_said(served: NodeProcess) -> None:
    with client_of(served) as client:
        answer = client.completions.create(prompt="a-word-that-nobody-else-says", max_tokens=3, **GREEDY)

    assert eventually(lambda: answer.id in served.log, 10)
    (line,) = [json.loads(line) for line in served.log.splitlines() if answer.id in line]
    assert (line["event"], line["tokens"], line["finish"]) == ("answered", 3, "length")
    assert "a-word-that-nobody-else-says" not in served.log


def test_a_client_of_a_swarm_serves_its_model_to_who_has_the_key(
    own: Nodes, checkpoints: Checkpoints, wanted: tuple[Generated, Generated], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "a-key-of-enough-letters"
    first, second = own.swarm(checkpoints.converted(FAMILY), "*:0-3", "*:4-7")
    monkeypatch.setenv("MOEHIVE_SERVE_API_KEY", key)
    monkeypatch.setenv("MOEHIVE_SERVE_JOIN", first.ticket)
    process = own.run("serve", "--model", first.ready()["modelId"], *HERE)
    health = process.ready()["url"].removesuffix("/v1") + "/health/ready"

    with client_of(process) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with client_of(process, key) as client:
        answer = client.chat.completions.create(messages=SAY[1:], max_tokens=TOKENS, **GREEDY)
    assert answer.choices[0].message.content == wanted[1].text
    assert httpx.get(health).json()["status"] == "ready"
    process.stop()
    second.stop()
    first.stop()
