"""The routes: what a client may ask, put together from reading, checking, queueing and answering."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from moehive.protocol.errors import MoehiveError
from moehive.swarm.log import get_logger

from .access import Access, Guard
from .engine import Engine, Job, Outcome, Work
from .errors import ApiError, of_failure
from .events import AnswerForm, Kind, failure
from .limits import Limits, sampling_of
from .reading import PromptReader
from .replies import ClientGone, EventReply, error_reply, json_reply, read_json, while_connected
from .schema import ChatRequest, CompletionRequest, Message, Wishes, parse_chat, parse_completion

_GONE = 499  # what others say of clients that did not wait; nobody reads it
_log = get_logger(__name__)


class Served(Protocol):
    """A model, as far as requests have to do with it. Methods may be called from any thread."""

    name: str
    id: str
    limits: Limits

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens of a conversation. Raises ConfigError."""

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The tokens of a text. Raises ConfigError."""

    def unavailable(self) -> str:
        """Why answers would fail now; empty: they would not."""


@dataclass(frozen=True)
class Rules:
    """Who may ask."""

    access: Access = field(default_factory=Access)
    cors_origins: tuple[str, ...] = ()


def build_app(model: Served, engine: Engine, rules: Rules, extra: Sequence[BaseRoute] = ()) -> Starlette:
    """The application; `engine` has to run beside it. `extra` routes stand behind the same rules."""
    api = _Api(model, engine, int(time.time()))
    routes = [
        Route("/v1/models", api.list_models),
        Route("/v1/models/{name:path}", api.show_model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/health/live", api.live),
        Route("/health/ready", api.ready),
        Route("/health", api.ready),
        *extra,
    ]
    middleware = [Middleware(Guard, rules.access)]
    if rules.cors_origins:
        origins = rules.cors_origins
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        middleware.insert(0, cors)  # outside of the guard: a browser asks first, without the key
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: _on_api_error,
            MoehiveError: _on_moehive_error,
            HTTPException: _on_http_exception,
            ClientGone: _on_client_gone,
            Exception: _on_bug,
        },
    )


class _Api:
    """The handlers. They return answers or raise ApiError, MoehiveError, ClientGone."""

    def __init__(self, model: Served, engine: Engine, started: int) -> None:
        self._model = model
        self._engine = engine
        self._reader = PromptReader(engine)
        self._started = started

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return json_reply({"object": "list", "data": [self._described()]})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return json_reply(self._described())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked: ChatRequest = parse_chat(await read_json(request))
        self._check_model(asked.wishes.model)
        prompt = await self._reader.read(request, lambda: self._model.encode_chat(asked.messages))
        return await self._answer(request, "chat", asked.wishes, prompt)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked: CompletionRequest = parse_completion(await read_json(request))
        self._check_model(asked.wishes.model)
        prompt = asked.prompt
        if isinstance(prompt, str):
            text = prompt
            prompt = await self._reader.read(request, lambda: self._model.encode_text(text))
        return await self._answer(request, "text", asked.wishes, prompt)

    async def live(self, request: Request) -> Response:
        """GET /health/live: this process answers."""
        return json_reply({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """GET /health and /health/ready: the model can be used."""
        reason = self._model.unavailable()
        if reason:
            return json_reply({"status": "unavailable", "reason": reason}, 503)
        waiting = self._engine.waiting + self._reader.under_way
        return json_reply({"status": "ready", "model": self._model.name, "waiting": waiting})

    def _described(self) -> dict[str, Any]:
        return {"id": self._model.name, "object": "model", "created": self._started, "owned_by": "moehive"}

    def _check_model(self, name: str) -> None:
        if name not in (self._model.name, self._model.id):
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server has {self._model.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _answer(self, request: Request, kind: Kind, wishes: Wishes, prompt: tuple[int, ...]) -> Response:
        sampling = sampling_of(wishes, prompt, self._model.limits)
        form = AnswerForm(kind, _new_id(kind), self._model.name, int(time.time()), wishes.include_usage)
        job = self._engine.submit(Work(prompt, sampling))
        answered = _Answered(form, job)
        try:
            if not wishes.stream:
                return json_reply(await while_connected(request, answered.whole()))
            # The status says whether it works: so the first piece is waited for before it is sent.
            first = await while_connected(request, job.next())
            return EventReply(answered.events(first), job.cancel)
        except BaseException:
            job.cancel()
            raise


class _Answered:
    """What one job gives, in the form that was asked for."""

    def __init__(self, form: AnswerForm, job: Job) -> None:
        self._form = form
        self._job = job

    async def whole(self) -> dict[str, Any]:
        """All of it. Raises ApiError."""
        pieces: list[str] = []
        while isinstance(item := await self._job.next(), str):
            pieces.append(item)
        return self._form.whole("".join(pieces), self._ended(item), item.usage)

    async def events(self, item: str | Outcome) -> AsyncIterator[str]:
        """All of it, beginning with `item`, as events."""
        try:
            yield self._form.first()
            while isinstance(item, str):
                yield self._form.piece(item)
                item = await self._job.next()
            yield self._form.last(self._ended(item), item.usage)
        except ApiError as error:
            yield failure(error)

    def _ended(self, outcome: Outcome) -> Literal["stop", "length"]:
        assert outcome.reason != "halted", "only jobs without a reader are halted"
        _log.info(
            "answered",
            id=self._form.id,
            prompt_tokens=outcome.usage.prompt,
            cached_tokens=outcome.usage.cached,
            tokens=outcome.usage.completion,
            finish=outcome.reason,
        )
        return outcome.reason


def _new_id(kind: Kind) -> str:
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"


# --- errors ---------------------------------------------------------------------------------------------------------


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_reply(error)


async def _on_moehive_error(request: Request, error: Exception) -> Response:
    return error_reply(of_failure(error))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Of starlette: paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    reply = error_reply(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    reply.headers.update(error.headers or {})
    return reply


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _on_bug(request: Request, error: Exception) -> Response:
    """Ours; starlette raises it again, so that it is logged with its traceback."""
    return error_reply(of_failure(error))
