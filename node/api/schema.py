"""Requests: from JSON to frozen values, or an error that names the parameter.

Pure. Three kinds of parameters: those that are honoured; those that say nothing about the text, which are accepted; and
all others, which are refused unless their value is the one that changes nothing. What is not known is refused too: a
parameter that does nothing would be a promise that is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from .errors import ApiError, bad_request, not_supported

MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's, for completions without max_tokens

_MAX_INT: Final = (1 << 63) - 1
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Say nothing about the text.
_ACCEPTED: Final = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
# Of the others, the values that change nothing; None is one for all of them.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
_NEUTRAL_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    **_NEUTRAL,
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_TEXT: Final[Mapping[str, tuple[Any, ...]]] = {
    **_NEUTRAL,
    "logprobs": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}
_MESSAGE_KEYS: Final = frozenset({"role", "content"})
# Clients send back what they were sent; these are empty in an answer of ours.
_EMPTY_IN_MESSAGES: Final = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls"})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True)
class Wishes:
    """What both kinds of requests have in common. None: as the model recommends, or as the server does."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    usual_tokens: int | None = None  # most of an answer where max_tokens is None; None: what there is room for


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Of `POST /v1/chat/completions`."""

    wishes: Wishes
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Of `POST /v1/completions`."""

    wishes: Wishes
    prompt: str | tuple[int, ...]  # text, or tokens


def parse_body(body: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises ApiError."""
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and numbers without end among them
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise bad_request("the body is not a JSON object")
    for key in found:
        _check_unicode(key, "a key of the body")
    return found


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Raises ApiError."""
    _refuse_others(body, {"messages"}, _NEUTRAL_CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list with at least one message", "messages")
    return ChatRequest(
        wishes=_wishes(body),
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages)),
    )


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Raises ApiError."""
    _refuse_others(body, {"prompt"}, _NEUTRAL_TEXT)
    return CompletionRequest(
        replace(_wishes(body), usual_tokens=DEFAULT_COMPLETION_TOKENS), _prompt(body.get("prompt"))
    )


# --- parts ----------------------------------------------------------------------------------------------------------

_WISHES: Final = frozenset(
    {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream"}
    | {"stream_options"}
)


def _refuse_others(body: Mapping[str, Any], own: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in body.items():
        if name in own or name in _WISHES or name in _ACCEPTED:
            continue
        if name not in neutral:
            raise bad_request(f"unknown parameter: {name!r}", name, code="unknown_parameter")
        if value is not None and not any(_same(value, harmless) for harmless in neutral[name]):
            raise not_supported(name, neutral[name])


def _same(value: Any, harmless: Any) -> bool:
    """Equal, where 1 is not True and 0 not False, but 0.0 is 0."""
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)


def _wishes(body: Mapping[str, Any]) -> Wishes:
    stream = _boolean(body, "stream")
    return Wishes(
        model=_model(body.get("model")),
        max_tokens=_max_tokens(body),
        temperature=_number(body, "temperature", 0, 2),
        top_p=_number(body, "top_p", 0, 1),
        top_k=_integer(body, "top_k", 1, _MAX_INT),
        seed=_integer(body, "seed", -_MAX_INT - 1, _MAX_INT),
        stop=_stop(body.get("stop")),
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream=stream),
    )


def _model(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_request("model must name a model; GET /v1/models lists it", "model")
    return _check_unicode(value, "model")


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    old, new = (_integer(body, name, 1, _MAX_INT) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise bad_request("max_tokens and max_completion_tokens contradict each other", "max_completion_tokens")
    return old if new is None else new


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise bad_request(f"stop must be a text or a list of at most {MAX_STOPS} texts", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise bad_request(f"each stop must be a text of 1 to {MAX_STOP_CHARACTERS} characters", "stop")
        _check_unicode(stop, "stop")
    return tuple(stops)


def _include_usage(value: Any, *, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        raise bad_request("stream_options must be an object", "stream_options")
    if not stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    for name, chosen in value.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise bad_request(f"unknown parameter: {name!r}", "stream_options", code="unknown_parameter")
        if name == "include_obfuscation" and chosen not in (None, False):
            raise not_supported("stream_options.include_obfuscation", (False,))
    return _boolean(value, "include_usage", "stream_options.")


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise bad_request(f"{where} must be an object with role and content", where)
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_request(f"{where}.role must be one of {', '.join(_ROLES)}; tools are not supported", f"{where}.role")
    for name, content in value.items():
        if name in _EMPTY_IN_MESSAGES:
            if content not in (None, []):
                raise not_supported(f"{where}.{name}")
        elif name not in _MESSAGE_KEYS:
            raise not_supported(_check_unicode(f"{where}.{name}", where))
    return Message(_ROLES[role], _content(value.get("content"), role, f"{where}.content"))


def _content(value: Any, role: str, where: str) -> str:
    if value is None and role == "assistant":
        return ""
    if isinstance(value, str):
        return _check_unicode(value, where)
    if not isinstance(value, list):
        raise bad_request(f"{where} must be a text or a list of texts", where)
    return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise bad_request(f'{where} is not of type "text": this server reads text only', where)
    if not isinstance(value.get("text"), str):
        raise bad_request(f"{where}.text must be a text", where)
    if set(value) - {"type", "text"}:
        raise not_supported(_check_unicode(f"{where}.{min(set(value) - {'type', 'text'})}", where))
    return _check_unicode(value["text"], where)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return _check_unicode(value, "prompt")
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token <= _MAX_INT for token in value):
        return tuple(value)
    raise bad_request("prompt must be one text or one list of tokens", "prompt")


# --- values ---------------------------------------------------------------------------------------------------------


def _boolean(body: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{prefix}{name} must be true or false", prefix + name)
    return bool(value)


def _integer(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = _bounded(body.get(name), name, least, most, "a whole number", lambda value: type(value) is int)
    return None if value is None else int(value)


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = _bounded(body.get(name), name, least, most, "a number", lambda value: type(value) in (int, float))
    return None if value is None else float(value)


def _bounded(value: Any, name: str, least: float, most: float, what: str, fits: Callable[[Any], bool]) -> Any:
    if value is None:
        return None
    if not fits(value) or not least <= value <= most:
        span = f"from {least} to {most}" if most < _MAX_INT else f"of at least {least}" if least > 0 else ""
        raise bad_request(f"{name} must be {what} {span}".rstrip(), name)
    return value


def _check_unicode(text: str, where: str) -> str:
    """Half of a surrogate pair can be written in JSON, but is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"{where} is not valid Unicode", where) from error
    return text


def _no_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not JSON: {name} is no number")
