"""Connections that nothing comes of are closed; those that wait for an answer are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from moehive.node.http import patience
from moehive.node.http.hosting import HttpAddress, hosted

ANY_PORT = HttpAddress("127.0.0.1", 0)


async def end_of(address: HttpAddress, said: bytes = b"") -> bytes:
    """What a connection hears before it is closed from the other side."""
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(said)
        heard = await reader.read()
        writer.close()
        await writer.wait_closed()
        return heard


@asynccontextmanager
async def answering_late() -> AsyncIterator[HttpAddress]:
    """A server that works on one request as long as the context lasts, and then answers it."""
    released, asked = asyncio.Event(), asyncio.Event()

    async def answer(request: Request) -> PlainTextResponse:
        asked.set()
        await released.wait()
        return PlainTextResponse("late")

    async with hosted(Starlette(routes=[Route("/late", answer)]), ANY_PORT) as address, httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.get(f"{address.url}/late", timeout=60))
        await asked.wait()
        yield address
        released.set()
        assert (await asking).text == "late"


async def test_who_says_nothing_or_half_a_request_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    async with hosted(Starlette(), ANY_PORT) as address:
        assert await end_of(address) == b""
        assert await end_of(address, request) == b""
        assert (await end_of(address, request + b"\r\n" + request)).startswith(b"HTTP/1.1 404")


async def test_of_too_many_connections_the_oldest_idle_one_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody puts an application off, its health included, by connections alone."""
    monkeypatch.setattr(patience, "MOST_SOCKETS", 3)
    async with answering_late() as address, httpx.AsyncClient() as client:
        idle = [await asyncio.open_connection(address.host, address.port) for _ in range(12)]
        async with asyncio.timeout(60):
            for reader, _ in idle[:-2]:
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
        assert (await client.get(f"{address.url}/", timeout=60)).status_code == 404  # in place of the next one
        for _, writer in idle:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def test_where_all_are_worked_on_a_new_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_SOCKETS", 1)
    async with answering_late() as address, httpx.AsyncClient() as another:
        with pytest.raises(httpx.TransportError):
            await another.get(address.url, timeout=60)


class Looked(patience.PatientProtocol):
    """Without a server: only what it looks at, and whether it has closed."""

    def __init__(self) -> None:
        self.closed = False
        self.transport: Any = SimpleNamespace(close=lambda: setattr(self, "closed", True))
        self.cycle: Any = None
        self.loop: Any = SimpleNamespace(call_later=lambda seconds, call: None)


def test_who_asks_again_in_time_stays() -> None:
    connection = Looked()
    for _ in range(5):
        connection.cycle = SimpleNamespace(response_complete=True)  # another request each time
        connection._look()
        assert not connection.closed
    connection._look()
    assert connection.closed


async def test_who_waits_for_an_answer_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    asked, released = asyncio.Event(), asyncio.Event()

    async def slowly(request: Request) -> PlainTextResponse:
        asked.set()
        await released.wait()
        return PlainTextResponse("at last")

    async with (
        hosted(Starlette(routes=[Route("/", slowly)]), ANY_PORT) as address,
        httpx.AsyncClient(timeout=60) as client,
    ):
        asking = asyncio.create_task(client.get(address.url))
        await asked.wait()
        for _ in range(3):
            await end_of(address)  # as long as patience lasts
        released.set()
        assert (await asking).text == "at last"


async def test_nonsense_is_answered_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with hosted(Starlette(), ANY_PORT) as address:
        assert (await end_of(address, b"\x16\x03\x01 no HTTP\r\n\r\n")).startswith(b"HTTP/1.1 400")
    assert caplog.records == []
