"""Who may ask: the key, the names that the server goes by, and the web pages that may use it."""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.datastructures import Headers

from moehive.node.http.access import token_in

from .errors import ApiError
from .replies import error_reply

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]

_OPEN: Final = "/health"  # whoever runs the machine asks, without a key
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """`key` is what clients must send; None: nothing. `hosts` are the names under which they may come; None: any."""

    key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = None

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        """Why a request is not answered; None: it is."""
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            # A page of another site may have had its name point to this machine (DNS rebinding); then the browser takes
            # what we answer for that site's own.
            return ApiError(403, f"this server answers to {', '.join(sorted(self.hosts))} only", code="wrong_host")
        if self.key is None or path == _OPEN or path.startswith(f"{_OPEN}/"):
            return None
        if not hmac.compare_digest(token_in(headers.get("authorization", "")), self.key.encode()):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return None


def host_of(header: str) -> str:
    """The name in a Host header, without a port and in lower case; empty where it is none."""
    match = _HOST.fullmatch(header.strip().lower())
    return match[1] if match else ""


class Guard:
    """Lets requests through to `app` that `access` allows."""

    def __init__(self, app: Asgi, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """See ASGI."""
        error = self._access.refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_reply(error)(scope, receive, send)
