"""What a client of the API is told when something is wrong, in the form that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moehive.protocol.errors import CallerError, MoehiveError, PeerError, SwarmError

_INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer other than 200. `param` names the parameter at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """When to come back, where that helps."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def bad_request(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """The request cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def not_supported(param: str, neutral: Sequence[Any] = ()) -> ApiError:
    """A parameter that would change the answer, and cannot be honoured; with the values of it that change nothing."""
    or_say = ", or say " + " or ".join(map(json.dumps, neutral)) if neutral else ""
    message = f"{param} is not supported by this server: leave it out{or_say}"
    return bad_request(message, param, code="unsupported_parameter")


def of_failure(error: Exception) -> ApiError:
    """What a client is told about an error of a generation."""
    if isinstance(error, SwarmError | PeerError):
        return ApiError(503, str(error), kind="server_error", code="experts_unavailable", retry_after=10)
    if isinstance(error, CallerError):
        return bad_request(str(error))
    if isinstance(error, MoehiveError):
        return ApiError(500, str(error), kind="server_error", code=type(error).__name__)
    return ApiError(500, "the server failed; its log says why", kind="server_error", code="internal_error")
