"""A model for tests of the HTTP API, which says what it is told to, when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from moehive.node.api.engine import Outcome, Work
from moehive.node.api.events import Usage
from moehive.node.api.limits import Limits
from moehive.node.api.schema import Message
from moehive.protocol.errors import ConfigError

TIMEOUT = 30.0  # seconds; only a test that fails waits so long


class FakeModel:
    """Says "0 ", "1 " and so on, a token for each letter of the prompt; behind a gate where there is one."""

    name = "fake"
    id = "ab" * 32

    def __init__(self, *, gate: bool = False, context: int | None = 1000) -> None:
        self.limits = Limits(context, vocabulary=1 << 17)
        self.missing = ""
        self.chats = True
        self.failure: Exception | None = None  # raised where the gate is, instead of the next token
        self.worked_on: list[Work] = []
        self.halted = threading.Event()  # some generation was ended early
        self.began = threading.Semaphore(0)  # released for each generation
        self.read: list[str] = []  # prompts that were turned to tokens, or are being
        self.may_read = threading.Event()  # cleared: reading a prompt takes until it is set
        self.may_read.set()
        self._tokens = threading.Semaphore(0) if gate else None

    def let(self, tokens: int = 1) -> None:
        """Let it say so many more."""
        assert self._tokens is not None
        self._tokens.release(tokens)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not self.chats:
            raise ConfigError("no chat template")
        return self.encode_text("".join(message.content for message in messages))

    def encode_text(self, text: str) -> tuple[int, ...]:
        self.read.append(text)
        assert self.may_read.wait(TIMEOUT)
        return tuple(map(ord, text))

    def unavailable(self) -> str:
        return self.missing

    def generate(self, work: Work, write: Callable[[str], None], halted: Callable[[], bool]) -> Outcome:
        self.worked_on.append(work)
        self.began.release()
        most = min(work.sampling.max_tokens, len(work.prompt))
        for number in range(most):
            if self._tokens is not None:
                assert self._tokens.acquire(timeout=TIMEOUT)
            if self.failure is not None:
                raise self.failure
            write(f"{number} ")
            if halted():
                self.halted.set()
                return Outcome("halted", Usage(len(work.prompt), number + 1))
        reason = "stop" if most < work.sampling.max_tokens else "length"
        return Outcome(reason, Usage(len(work.prompt), most, 1))
