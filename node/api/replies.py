"""Reading requests and writing answers, each within bounds of bytes and time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from .errors import ApiError
from .schema import parse_body

MAX_BODY: Final = 4 << 20  # bytes
_READ_TIMEOUT: Final = 30.0  # seconds for a whole body

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object that was sent. Raises ApiError, ClientGone.

    Only where it says that it is JSON: a web page may send anything else to any server, without asking it first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json")
    try:
        async with asyncio.timeout(_READ_TIMEOUT):
            return parse_body(await _read(request))
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {_READ_TIMEOUT:g} s") from error
    except ClientDisconnect as error:
        raise ClientGone from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
    return bytes(body)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the client goes. Raises ClientGone."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: what is sent back of a request may not be valid Unicode."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


def error_reply(error: ApiError) -> Response:
    """Why not."""
    headers = dict(error.headers)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return json_reply(error.body, error.status, headers)


class EventReply(StreamingResponse):
    """Server-sent events. However it ends, also without having begun, `ended` is called."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        # X-Accel-Buffering: a proxy is not to wait for more.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
