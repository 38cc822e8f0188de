"""`moehive serve`: who may ask, and what is refused before anything is loaded."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import httpx
import pytest
from support.fake_model import TIMEOUT, FakeModel

from moehive.node.api.app import build_app
from moehive.node.api.engine import Engine
from moehive.node.cli import serve as serve_module
from moehive.node.cli.serve import ServeOptions, rules_of
from moehive.protocol.errors import ConfigError

KEY = "a-key-of-enough-letters"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """For its owner alone."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(KEY + "\n")
    return path


def test_by_default_this_machine_alone_and_under_its_own_names():
    address, rules = rules_of(ServeOptions(), {})

    assert (address.host, address.port, address.is_loopback) == ("127.0.0.1", 8080, True)
    assert rules.access.hosts == {"127.0.0.1", "localhost", "[::1]"}
    assert (rules.access.key, rules.cors_origins) == (None, ())
    assert rules_of(ServeOptions(host="localhost"), {})[0] == address
    assert "127.0.0.2" in (rules_of(ServeOptions(host="127.0.0.2"), {})[1].access.hosts or ())


def test_others_need_a_key_and_may_come_under_any_name(key_file):
    with pytest.raises(ConfigError, match="--api-key-file FILE"):
        rules_of(ServeOptions(host="0.0.0.0"), {})
    for options, environment in (
        (ServeOptions(host="0.0.0.0", api_key_file=key_file), {}),
        (ServeOptions(host="::"), {"MOEHIVE_SERVE_API_KEY": KEY}),
    ):
        address, rules = rules_of(options, environment)
        assert (rules.access.key, rules.access.hosts, address.is_loopback) == (KEY, None, False)


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "https://Chat.example", "null", ""])
def test_an_origin_that_no_browser_says_is_refused(origin):
    with pytest.raises(ConfigError, match="is no origin"):
        rules_of(ServeOptions(cors_origin=(origin,)), {})


@pytest.mark.parametrize("origin", ["https://chat.example", "http://[::1]:3000", "moz-extension://0a-1b"])
def test_an_origin_that_may_use_it(origin):
    assert rules_of(ServeOptions(cors_origin=(origin,)), {})[1].cors_origins == (origin,)


def test_a_key_that_others_could_know_is_refused(key_file, tmp_path):
    key_file.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {key_file}"):
        rules_of(ServeOptions(api_key_file=key_file), {})
    with pytest.raises(ConfigError, match="cannot be read from"):
        rules_of(ServeOptions(api_key_file=tmp_path / "none"), {})
    for key in ("", "short", "with a space in it", "mit-Umlauten-ä-ö-ü-ß"):
        with pytest.raises(ConfigError, match="at least 16 letters"):
            rules_of(ServeOptions(), {"MOEHIVE_SERVE_API_KEY": key})
    with pytest.raises(ConfigError, match="leave one out"):
        rules_of(ServeOptions(api_key_file=key_file), {"MOEHIVE_SERVE_API_KEY": KEY})


def test_every_web_page_only_with_a_key():
    options = ServeOptions(cors_origin=("*",))
    with pytest.raises(ConfigError, match="every web page"):
        rules_of(options, {})
    assert rules_of(options, {"MOEHIVE_SERVE_API_KEY": KEY})[1].cors_origins == ("*",)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host", "0.0.0.0"), "--api-key-file FILE"),
        (("--host", "example.org"), "no IP address"),
        (("--port", "65536"), "--port"),
        (("--queue", "0"), "--queue"),
        (("--join", "moehive1"), "join ticket"),
    ],
)
def test_mistakes_are_refused_with_exit_code_2(moehive, converted, arguments, said):
    outcome = moehive("serve", "--model", converted, *arguments)

    assert outcome.code == 2
    assert said in outcome.err


def test_an_address_in_use_is_told_with_exit_code_1(moehive, converted):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = moehive("serve", "--model", converted, "--port", port)

    assert outcome.code == 1
    assert f"http://127.0.0.1:{port} cannot be listened at" in outcome.err
    assert "name another port" in outcome.err


async def test_at_the_end_a_stream_is_told_why_it_does_not_go_on(monkeypatch, caplog):
    monkeypatch.setattr(serve_module, "_GRACE", 0.1)
    model, stop = FakeModel(gate=True), asyncio.Event()
    address, rules = rules_of(ServeOptions(port=0), {})
    engine, listening = Engine(model.generate), asyncio.get_running_loop().create_future()
    app = build_app(model, engine, rules)
    running = asyncio.create_task(serve_module._run(engine, app, address, listening.set_result, stop))
    url = (await asyncio.wait_for(listening, TIMEOUT)).url
    model.let(1)
    body = {"model": "fake", "prompt": "abc", "stream": True}
    async with (
        httpx.AsyncClient(timeout=TIMEOUT) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        stop.set()
        for _ in range(500):  # it is asked after a token
            if await asyncio.to_thread(model.halted.wait, 0.3):
                break
            model.let()
        rest = [line async for line in lines if line]
    await running

    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
