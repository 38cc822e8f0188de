"""Answers: what clients get of a generation, as one object or as events of a stream. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import ApiError

DONE: Final = "data: [DONE]\n\n"
Kind = Literal["chat", "text"]
Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer."""

    prompt: int
    completion: int
    cached: int = 0  # of the prompt: computed for an earlier request

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's terms."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How one request is answered: as a chat or as a text, under this id."""

    kind: Kind
    id: str
    model: str
    created: int  # seconds since the epoch
    with_usage: bool = False  # of a stream: an event at its end

    def whole(self, text: str, reason: Reason, usage: Usage) -> dict[str, Any]:
        """All of it at once."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._object("", [choice]) | {"usage": usage.body}

    def first(self) -> str:
        """The event that a stream begins with: whose turn it is."""
        return self._event({"role": "assistant", "content": ""}) if self.kind == "chat" else ""

    def piece(self, text: str) -> str:
        """An event with more text."""
        return self._event({"content": text} if self.kind == "chat" else text)

    def last(self, reason: Reason, usage: Usage) -> str:
        """The events that a stream ends with."""
        end = self._event({} if self.kind == "chat" else "", reason)
        if self.with_usage:
            end += event(self._object(".chunk", []) | {"usage": usage.body})
        return end + DONE

    def _event(self, content: Mapping[str, str] | str, reason: Reason | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        choice |= {"text": content} if isinstance(content, str) else {"delta": dict(content)}
        body = self._object(".chunk", [choice])
        return event(body | {"usage": None} if self.with_usage else body)

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Pieces of a text are called as the whole is; only chats have a name for them.
        name = f"chat.completion{suffix}" if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def event(body: Mapping[str, Any]) -> str:
    """One server-sent event: one line of ASCII, as some clients take other characters for the end of a line."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def failure(error: ApiError) -> str:
    """The event that a stream ends with when it cannot go on; nothing follows it."""
    return event(error.body)
