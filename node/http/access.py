"""Who may ask: this machine under its own names, or whoever knows the token; and what browsers are told of it all.

A web page that the user has open anywhere can have the browser send requests to 127.0.0.1. It cannot read the answers,
as nothing here allows another origin, unless its name was made to point to 127.0.0.1 (DNS rebinding): the browser then
takes us for that page's own server. So at a loopback address only requests to a name of this machine are answered.
Elsewhere the token is what such a page does not have.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moehive.protocol.errors import ConfigError

from .hosting import HttpAddress

MIN_TOKEN: Final = 16  # characters
_MAX_TOKEN: Final = 1024
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def guards(address: HttpAddress, token: str | None, *, free: Collection[str] = ()) -> Sequence[Middleware]:
    """Middleware, outermost first, for an application at `address`; paths in `free` are answered without the token."""
    around = [Middleware(SafeHeaders)]
    names = own_names(address)
    if names is not None:
        around.append(Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
    if token is not None:
        around.append(Middleware(TokenNeeded, token=token, free=frozenset(free)))
    return around


def own_names(address: HttpAddress) -> Sequence[str] | None:
    """What a `Host` may say at a loopback address, without a port; None: anything, elsewhere."""
    if not address.is_loopback:
        return None
    host = f"[{address.host}]" if ":" in address.host else address.host
    return [*dict.fromkeys((*_LOCAL_NAMES, host))]


def is_token(text: str) -> bool:
    """Whether it is long enough, and can stand in a header."""
    return MIN_TOKEN <= len(text) <= _MAX_TOKEN and text.isascii() and text.isprintable() and " " not in text


def read_token(path: Path, what: str = "token") -> str:
    """The token in a file, called `what`. Raises ConfigError where it is none, too short, or others can read it."""
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(_MAX_TOKEN + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError(f"the {what} cannot be read from {path}: {reason}") from error
    if not is_token(token):
        raise ConfigError(f"{path} holds no {what}: one word of {MIN_TOKEN} to {_MAX_TOKEN} letters and digits is one")
    if mode & 0o077:
        raise ConfigError(f"the {what} in {path} can be read by other users; run: chmod 600 {path}")
    return token


class SafeHeaders:
    """Keep browsers from storing, framing, embedding, and running anything that is not ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class TokenNeeded:
    """Answers 401 without the token: `Bearer TOKEN`, or `Basic` with it as the password, which browsers ask for."""

    def __init__(self, app: ASGIApp, token: str, free: Collection[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._free = free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = Headers(scope=scope).get("authorization", "")
        if scope["path"] in self._free or hmac.compare_digest(token_in(said), self._token):
            await self._app(scope, receive, send)
            return
        challenge = {"www-authenticate": 'Basic realm="moehive: any name, and the token as the password"'}
        await PlainTextResponse("the token is needed\n", status_code=401, headers=challenge)(scope, receive, send)


def token_in(authorization: str) -> bytes:
    """What an `Authorization` says. Empty where there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""
