"""Who is answered: this machine under its own names, or whoever has the token."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from moehive.node.http.access import guards, read_token, token_in
from moehive.node.http.hosting import HttpAddress
from moehive.protocol.errors import ConfigError

LOOPBACK, EVERYWHERE = HttpAddress("127.0.0.1", 9464), HttpAddress("0.0.0.0", 9464)
TOKEN = "0123456789abcdef"


async def answer(request: Request) -> PlainTextResponse:
    return PlainTextResponse("here")


def basic(name: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


@asynccontextmanager
async def client_of(address: HttpAddress, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    routes = [Route("/free", answer), Route("/other", answer)]
    app = Starlette(routes=routes, middleware=[*guards(address, token, free=("/free",))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9464") as client:
        yield client


@pytest.mark.parametrize("host", ["127.0.0.1:9464", "localhost", "LOCALHOST:80", "[::1]:9464"])
async def test_at_loopback_its_own_names_are_answered(host: str) -> None:
    async with client_of(LOOPBACK) as client:
        assert (await client.get("/other", headers={"host": host})).text == "here"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "127.0.0.1.evil.example", "localhost@evil", ""])
@pytest.mark.parametrize("path", ["/other", "/free"])
async def test_at_loopback_other_names_are_not(host: str, path: str) -> None:
    async with client_of(LOOPBACK) as client:
        assert (await client.get(path, headers={"host": host})).status_code == 400


async def test_another_loopback_address_is_a_name_too() -> None:
    async with client_of(HttpAddress("127.0.0.2", 1)) as client:
        assert (await client.get("/other", headers={"host": "127.0.0.2:1"})).status_code == 200


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer", 401),
        (TOKEN, 401),
        (basic("me", TOKEN), 200),
        (basic(TOKEN, ""), 401),
        ("Basic %%%", 401),
        ("Basic é".encode(), 401),
    ],
)
@pytest.mark.parametrize("address", [LOOPBACK, EVERYWHERE])
async def test_a_token_is_needed_where_there_is_one(
    address: HttpAddress, authorization: str | bytes | None, code: int
) -> None:
    async with client_of(address, TOKEN) as client:
        headers = {} if authorization is None else {"authorization": authorization}
        found = await client.get("/other", headers=headers)
        assert found.status_code == code
        assert ("www-authenticate" in found.headers) is (code == 401)
        assert (await client.get("/free")).status_code == 200


@given(st.text())
def test_nonsense_is_no_token(text: str) -> None:
    assert token_in(f"Basic {text}") != TOKEN.encode()


async def test_every_answer_tells_browsers_to_keep_it_to_themselves() -> None:
    async with client_of(LOOPBACK, TOKEN) as client:
        for answer in (
            await client.get("/free"),
            await client.get("/other"),
            await client.get("/free", headers={"host": "evil.example"}),
        ):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
            assert "access-control-allow-origin" not in answer.headers


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_is_one_word_in_a_private_file(tmp_path: Path) -> None:
    assert read_token(write(tmp_path / "token", f"{TOKEN}\n")) == TOKEN


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (TOKEN, 0o640, "run: chmod 600"),
        ("short", 0o600, "holds no token: one word of 16 to 1024"),
        ("root:x:0:0:root:/root:/bin/sh of everybody", 0o644, "holds no token"),
        ("two words of text", 0o600, "holds no token"),
        ("x" * 2000, 0o600, "holds no token"),
        ("", 0o600, "holds no token"),
        ("é" * 20, 0o600, "it is not ASCII"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path: Path, text: str, mode: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_token(write(tmp_path / "token", text, mode))
    with pytest.raises(ConfigError, match="No such file"):
        read_token(tmp_path / "nothing")
