"""`moehive chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from moehive.protocol.errors import ConfigError

from .arguments import Positive
from .loading import LoadedModel, LoadOptions, loaded_model, quiet_libraries
from .output import Line, note
from .sampling import SamplingOptions

if TYPE_CHECKING:
    from moehive.swarm.text.reuse import KeptPrefix
    from moehive.swarm.text.sampling import Sampling

_PROMPT: Final = ">>> "
_HELP: Final = "/reset begins anew, /exit leaves; Ctrl-C stops an answer, Ctrl-D leaves"
_OTHERWISE: Final = "continue texts with it instead, by `moehive generate`"
_DEFAULTS = SamplingOptions()


def chat(
    *,
    loading: LoadOptions,
    max_tokens: Positive = 1024,
    choice: SamplingOptions = _DEFAULTS,
    system: str | None = None,
) -> None:
    """Talk with a model; answers appear while they are made.

    /reset begins a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer and keeps what there is of it.
    Where stdin is not a terminal each of its lines is a turn, only the answers are printed, and Ctrl-C ends it all.

    Parameters
    ----------
    max_tokens:
        Most tokens of one answer.
    system:
        What the model is told before the conversation.
    """
    loading.check()
    choice.chosen(max_tokens)  # a contradiction is refused before anything is loaded
    quiet_libraries()
    from moehive.swarm.text.prompts import encode_chat, need_tokenizer
    from moehive.swarm.text.reuse import KeptPrefix

    with loaded_model(loading) as loaded:
        conversation = Conversation(loaded, loading, choice, max_tokens, KeptPrefix(), system)
        # A model that cannot be talked with is refused before anything is typed.
        hello = [*conversation.messages, {"role": "user", "content": "hello"}]
        encode_chat(need_tokenizer(loaded.tokenizer), hello, otherwise=_OTHERWISE)
        talk(conversation)


@dataclass
class Conversation:
    """What was said so far, and the model that answers."""

    loaded: LoadedModel
    loading: LoadOptions
    choice: SamplingOptions
    max_tokens: int  # of one answer
    kept: KeptPrefix
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str, write: Callable[[str], None], halted: Callable[[], bool]) -> None:
        """One turn. Where it fails or is interrupted, nothing of it is remembered; where `halted` ends it, what was
        said until then is. Raises ConfigError where the conversation has become too long.
        """
        from moehive.swarm.text.generation import continue_tokens
        from moehive.swarm.text.prompts import encode_chat, need_tokenizer

        tokenizer = need_tokenizer(self.loaded.tokenizer)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(tokenizer, messages, otherwise=_OTHERWISE)
        made = continue_tokens(
            self.loaded.model,
            tokenizer,
            prompt,
            self._sampling(len(prompt)),
            write,
            drafts=self.loaded.drafts,
            kv=self.loading.kv.options,
            kept=self.kept,
            halted=halted,
            measured=False,
        )
        self.messages = [*messages, {"role": "assistant", "content": made.text}]

    def _sampling(self, prompt: int) -> Sampling:
        """For a prompt of so many tokens, within the model's context."""
        from moehive.swarm.text.prompts import context_of

        sampling, context = self.choice.chosen(self.max_tokens), context_of(self.loaded.model)
        if context is None:
            return sampling
        if prompt >= context:
            raise ConfigError(
                f"the conversation is longer than the model's context of {context} tokens: /reset begins anew"
            )
        return replace(sampling, max_tokens=min(sampling.max_tokens, context - prompt))


def talk(conversation: Conversation) -> None:
    """Turn after turn, until the end of stdin or /exit."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # from here on `input` has a history and can be edited
        note(_HELP)
    for line in _lines():
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
        elif command.startswith("/") and command[1:].isalpha():
            note(f"there is no {command}: {_HELP}")
        elif command:
            _turn(conversation, line)


def _turn(conversation: Conversation, line: str) -> None:
    write = Line()
    try:
        with _halting() as halted:
            conversation.answer(line, write, halted)
    except KeyboardInterrupt:
        write.end()
        if not sys.stdin.isatty():
            raise
        note("interrupted: this turn is forgotten")
        return
    except ConfigError as error:
        if not sys.stdin.isatty():
            raise
        note(f"moehive: {error}")
    write.end()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:  # at the prompt: the line is dropped
            note("")


@contextmanager
def _halting() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C asks what runs to end after its token; the second one interrupts it.

    Where nobody types, Ctrl-C is meant for all of it, not for the first of many lines.
    """
    if not sys.stdin.isatty():
        yield lambda: False
        return
    asked: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
