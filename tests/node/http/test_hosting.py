"""An application is at its address while the block lasts, beside whatever else runs on the loop."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import httpx
import pytest

from moehive.node.http import hosting
from moehive.node.http.hosting import HttpAddress, hosted
from moehive.protocol.errors import TransportError

ANY_PORT = HttpAddress("127.0.0.1", 0)


class Echo:
    """Answers with the path once `released` is set."""

    def __init__(self) -> None:
        self.asked, self.released = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.set()
        await self.released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


async def test_answers_at_the_port_that_it_got() -> None:
    app = Echo()
    app.released.set()
    async with hosted(app, ANY_PORT) as address, httpx.AsyncClient(base_url=address.url, timeout=60) as client:
        assert address.port > 0
        assert (await client.get("/path")).text == "/path"
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(address.host, address.port)


async def test_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    app = Echo()
    app.released.set()
    async with hosted(app, ANY_PORT) as address, httpx.AsyncClient(timeout=60) as client:
        await client.get(address.url)
        assert signal.getsignal(signal.SIGINT) is before


async def test_a_request_in_progress_ends_before_the_block_does() -> None:
    app = Echo()
    async with httpx.AsyncClient(timeout=60) as client:
        async with hosted(app, ANY_PORT, grace=60) as address:
            asking = asyncio.create_task(client.get(address.url + "/late"))
            await app.asked.wait()
            asyncio.get_running_loop().call_later(0.05, app.released.set)
        assert (await asking).text == "/late"


async def test_a_request_that_never_ends_is_given_up() -> None:
    app = Echo()
    async with httpx.AsyncClient(timeout=60) as client:
        async with hosted(app, ANY_PORT, grace=1) as address:
            asking = asyncio.create_task(client.get(address.url))
            await app.asked.wait()
        assert (await asking).status_code == 500


async def test_a_peer_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "_UNREAD", 200)
    gone = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.create_task(_send_without_end(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        sending.cancel()
        gone.set()

    async with hosted(endless, ANY_PORT) as address:
        _, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(gone.wait(), 20)
        writer.close()


async def _send_without_end(send: Any) -> None:
    while True:
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await asyncio.sleep(0)


async def test_what_a_peer_does_not_read_does_not_outlive_the_block() -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(64 << 20)})

    async with hosted(large, ANY_PORT, grace=1) as address:
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readline()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(64 << 20)
    writer.close()


async def test_an_address_in_use_is_told() -> None:
    async with hosted(Echo(), ANY_PORT) as address:
        with pytest.raises(TransportError, match=rf"http://127.0.0.1:{address.port} cannot be listened at"):
            async with hosted(Echo(), address):
                pass


@pytest.mark.parametrize(
    ("host", "url", "loopback"),
    [
        ("127.0.0.1", "http://127.0.0.1:8", True),
        ("::1", "http://[::1]:8", True),
        ("0.0.0.0", "http://0.0.0.0:8", False),
    ],
)
def test_addresses(host: str, url: str, loopback: bool) -> None:
    assert (HttpAddress(host, 8).url, HttpAddress(host, 8).is_loopback) == (url, loopback)
