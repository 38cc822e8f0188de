"""The routes over HTTP, with a model that does as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from support.fake_model import TIMEOUT, FakeModel

from moehive.node.api import engine as engine_module
from moehive.node.api import replies
from moehive.node.api.access import Access
from moehive.node.api.app import Rules, build_app
from moehive.node.api.engine import Engine
from moehive.node.http.hosting import HttpAddress, hosted
from moehive.protocol.errors import ExpertUnavailable

CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "abc"}]}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "abc"}


@asynccontextmanager
async def served(
    model: FakeModel, rules: Rules | None = None, *, waiting: int = 16, extra: Any = ()
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a real server."""
    engine = Engine(model.generate, waiting=waiting)
    working = asyncio.create_task(engine.run())
    app = build_app(model, engine, rules or Rules(), extra)
    try:
        async with (
            hosted(app, HttpAddress("127.0.0.1", 0), grace=1) as address,
            httpx.AsyncClient(base_url=address.url, timeout=TIMEOUT) as client,
        ):
            yield client
    finally:
        working.cancel()
        if model._tokens is not None:
            model.let(10_000)
        await asyncio.wait([working])


def events_of(text: str) -> list[Any]:
    """The events of a stream."""
    datas = [part.removeprefix("data: ") for part in text.split("\n\n")]
    assert datas.pop() == ""
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def request_head(length: int) -> bytes:
    """Of a completion whose body has so many bytes."""
    lines = "POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"
    return "\r\n".join((*lines, "", "")).encode()


def error_of(answer: httpx.Response) -> tuple[int, str, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["type"], error["param"], error["code"]


async def test_models():
    async with served(FakeModel()) as client:
        listed = (await client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["fake"]
        assert (await client.get("/v1/models/fake")).json() == listed["data"][0]
        assert (await client.get(f"/v1/models/{FakeModel.id}")).status_code == 200
        assert error_of(await client.get("/v1/models/a/b")) == (
            404, "invalid_request_error", "model", "model_not_found",
        )  # fmt: skip


async def test_answers():
    async with served(FakeModel()) as client:
        chat = (await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2})).json()
        text = (await client.post("/v1/completions", json=TEXT | {"model": FakeModel.id})).json()

    assert chat["choices"][0]["message"]["content"] == "0 1 "
    assert chat["choices"][0]["finish_reason"] == "length"
    assert chat["usage"]["total_tokens"] == 5
    assert (text["choices"][0]["text"], text["choices"][0]["finish_reason"]) == ("0 1 2 ", "stop")
    assert (text["model"], text["id"][:5], chat["id"][:9]) == ("fake", "cmpl-", "chatcmpl-")


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_streams(path, body):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with served(FakeModel()) as client:
        whole = (await client.post(path, json=body)).json()
        answer = await client.post(path, json=body | options)

    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert usage["usage"] == whole["usage"]
    choices = [part["choices"][0] for part in parts]
    said = [choice.get("text", choice.get("delta", {}).get("content", "")) for choice in choices]
    kept = whole["choices"][0]
    assert "".join(said) == kept.get("text", kept.get("message", {}).get("content"))
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({part["id"] for part in [*parts, usage]}) == 1


async def test_the_text_streams_while_it_is_made():
    model = FakeModel(gate=True)
    async with served(model) as client:
        model.let(1)
        async with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as answer:
            lines = answer.aiter_lines()
            assert '"0 "' in await anext(lines)
            model.let(2)
            assert "data: [DONE]" in [line async for line in lines]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (CHAT | {"model": "other"}, (404, "invalid_request_error", "model", "model_not_found")),
        (CHAT | {"n": 2}, (400, "invalid_request_error", "n", "unsupported_parameter")),
        (CHAT | {"max_tokens": 998}, (400, "invalid_request_error", "max_tokens", "context_length_exceeded")),
        (CHAT | {"messages": [{"role": "user", "content": "a" * 1000}]},
         (400, "invalid_request_error", None, "context_length_exceeded")),
        ({"\\ud800": 1}, (400, "invalid_request_error", "\\ud800", "unknown_parameter")),
    ],
)  # fmt: skip
async def test_requests_that_are_wrong(body, error):
    async with served(FakeModel()) as client:
        assert error_of(await client.post("/v1/chat/completions", json=body)) == error


async def test_what_is_no_json_or_too_large_or_too_slow(monkeypatch):
    monkeypatch.setattr(replies, "MAX_BODY", 1000)
    monkeypatch.setattr(replies, "_READ_TIMEOUT", 0.05)
    async with served(FakeModel()) as client:
        path, json_type = "/v1/completions", {"content-type": "application/json; charset=utf-8"}
        assert error_of(await client.post(path, content="{}", headers={"content-type": "text/plain"}))[0] == 415
        assert error_of(await client.post(path, content="{}"))[0] == 415
        assert error_of(await client.post(path, content="{", headers=json_type))[0] == 400
        assert error_of(await client.post(path, content=" " * 1001, headers=json_type))[0] == 413
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(request_head(10) + b"{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        assert error_of(await client.get(path))[0] == 405
        assert error_of(await client.get("/v2"))[0] == 404


async def test_a_model_without_a_chat_template():
    model = FakeModel()
    model.chats = False
    async with served(model) as client:
        assert error_of(await client.post("/v1/chat/completions", json=CHAT))[0] == 400
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_a_full_queue():
    model = FakeModel(gate=True)
    async with served(model, waiting=1) as client:
        asking = [asyncio.create_task(client.post("/v1/completions", json=TEXT))]
        assert await asyncio.to_thread(model.began.acquire, timeout=TIMEOUT)
        asking.append(asyncio.create_task(client.post("/v1/completions", json=TEXT)))
        while (await client.get("/health/ready")).json()["waiting"] == 0:
            pass
        refused = await client.post("/v1/completions", json=TEXT)
        assert error_of(refused) == (429, "rate_limit_error", None, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        model.let(6)
        assert [(await task).status_code for task in asking] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_experts_that_nobody_has_before_the_first_token(stream):
    model = FakeModel()
    model.failure = ExpertUnavailable(3, [1])
    async with served(model) as client:
        answer = await client.post("/v1/completions", json=TEXT | {"stream": stream})

    assert error_of(answer) == (503, "server_error", None, "experts_unavailable")


async def test_experts_that_nobody_has_any_more_end_a_stream_with_an_error():
    model = FakeModel(gate=True)
    async with served(model) as client:
        model.let(1)
        async with client.stream("POST", "/v1/completions", json=TEXT | {"stream": True}) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            model.failure = ExpertUnavailable(3, [1])
            model.let(1)
            rest = [line async for line in lines if line]

    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "experts_unavailable"
    assert "data: [DONE]" not in rest


async def test_a_bug_is_told_without_its_insides():
    model = FakeModel()
    model.failure = ZeroDivisionError("secret")
    async with served(model) as client:
        answer = await client.post("/v1/completions", json=TEXT)

    assert error_of(answer) == (500, "server_error", None, "internal_error")
    assert "secret" not in answer.text


# --- clients that go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_halts_its_generation(stream, caplog):
    model = FakeModel(gate=True)
    async with served(model) as client:
        asking = asyncio.create_task(
            client.post("/v1/completions", json=TEXT | {"stream": stream, "prompt": "a" * 900})
        )
        assert await asyncio.to_thread(model.began.acquire, timeout=TIMEOUT)
        if stream:
            model.let(3)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(500):  # it is told after a token, whenever the server has noticed
            model.let()
            if await asyncio.to_thread(model.halted.wait, 0.02):
                break
        assert model.halted.is_set()
        assert (await client.get("/health/live")).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_goes_while_it_waits_frees_its_place_at_once():
    model = FakeModel(gate=True)
    async with served(model, waiting=1) as client:
        first = asyncio.create_task(client.post("/v1/completions", json=TEXT))
        assert await asyncio.to_thread(model.began.acquire, timeout=TIMEOUT)
        second = asyncio.create_task(client.post("/v1/completions", json=TEXT))
        while (await client.get("/health/ready")).json()["waiting"] == 0:
            pass
        second.cancel()
        while (await client.get("/health/ready")).json()["waiting"] == 1:
            pass
        model.let(3)
        assert (await first).status_code == 200

    assert len(model.worked_on) == 1


async def test_prompts_of_clients_that_have_gone_are_not_read():
    model = FakeModel()
    model.may_read.clear()
    async with served(model) as client:
        asking = [asyncio.create_task(client.post("/v1/completions", json=TEXT))]
        while not model.read:
            await client.get("/health/live")
        asking += [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(5)]
        while (await client.get("/health/ready")).json()["waiting"] < 6:
            pass
        for task in asking:
            task.cancel()
        while (await client.get("/health/ready")).json()["waiting"] > 1:  # a thread that reads cannot be ended
            pass
        model.may_read.set()
        assert (await client.post("/v1/completions", json=TEXT | {"prompt": "xyz"})).status_code == 200

    assert model.read == ["abc", "xyz"]


async def test_prompts_that_are_read_count_among_what_waits():
    model = FakeModel()
    model.may_read.clear()
    async with served(model, waiting=1) as client:
        asking = [asyncio.create_task(client.post("/v1/completions", json=TEXT)) for _ in range(2)]
        while (await client.get("/health/ready")).json()["waiting"] < 2:
            pass
        assert error_of(await client.post("/v1/completions", json=TEXT)) == (
            429, "rate_limit_error", None, "queue_full",
        )  # fmt: skip
        model.may_read.set()
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200, 200]


async def test_a_reader_that_stops_reading_does_not_keep_the_model(monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_UNREAD", 100)
    model = FakeModel(gate=True, context=None)
    body = json.dumps(TEXT | {"stream": True, "prompt": "a" * 100_000, "max_tokens": 100_000}).encode()
    async with served(model) as client:
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port, limit=1024)
        writer.write(request_head(len(body)) + body)
        for _ in range(100):  # some 15 MB of events are more than all buffers on the way hold
            model.let(1000)
            if await asyncio.to_thread(model.halted.wait, 0.02):
                break
        assert model.halted.is_set()
        model.let(3)
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
        writer.close()


# --- rules ----------------------------------------------------------------------------------------------------------


async def test_health():
    model = FakeModel()
    async with served(model) as client:
        assert (await client.get("/health/live")).json() == {"status": "live"}
        assert (await client.get("/health")).json() == {"status": "ready", "model": "fake", "waiting": 0}
        model.missing = "3 experts are held by nobody"
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, model.missing)
        assert (await client.get("/health/live")).status_code == 200


async def test_a_key_and_the_hosts_name_are_asked_for():
    rules = Rules(Access("the-key-of-this-server", frozenset({"127.0.0.1"})))
    async with served(FakeModel(), rules) as client:
        assert (await client.get("/health")).status_code == 200
        refused = await client.get("/v1/models")
        assert error_of(refused)[0] == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        key = {"authorization": "Bearer the-key-of-this-server"}
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        assert error_of(await client.get("/v1/models", headers=key | {"host": "evil.example"}))[0] == 403


async def test_other_sites_may_not_use_it_unless_they_are_named():
    origin = {"origin": "https://chat.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    async with served(FakeModel()) as client:
        assert (await client.options("/v1/completions", headers=preflight)).status_code == 405
        assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=origin)).headers
    async with served(FakeModel(), Rules(Access("key"), ("https://chat.example",))) as client:
        asked = await client.options("/v1/completions", headers=preflight)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        refused = await client.get("/v1/models", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
        other = await client.options("/v1/completions", headers=preflight | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_further_routes_stand_behind_the_same_rules():
    extra = [Route("/metrics", lambda request: PlainTextResponse("x 1"))]
    async with served(FakeModel(), Rules(Access("key")), extra=extra) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"authorization": "Bearer key"})).text == "x 1"
