"""A transformers model behind the API: prompts to tokens, and generations that reuse the last one's beginning."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moehive.node.text.generation import continue_tokens
from moehive.node.text.prompts import context_of, encode_chat, encode_text, has_template, need_tokenizer
from moehive.node.text.reuse import KeptPrefix
from moehive.swarm.model.kv.options import KvOptions

from .engine import Outcome, Work
from .events import Usage
from .limits import Limits
from .schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ServedModel:
    """See app.Served. `generate` is for one thread at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        name: str,
        id: str,  # noqa: A002  # as it is called everywhere
        max_tokens: int | None = None,
        drafts: Mapping[str, Any],
        kv: KvOptions,
        reuse: bool = True,
        missing: Callable[[], int] = lambda: 0,
    ) -> None:
        """Raises ConfigError for a model without a tokenizer."""
        self.name = name
        self.id = id
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.limits = Limits(context_of(model), vocabulary, max_tokens)
        self._model = model
        self._tokenizer = need_tokenizer(tokenizer)
        # A tokenizer must not be used by two threads at once, and whoever reads a long prompt is not to hold up the
        # text of another answer: so there is one for each way.
        self._encoder = copy.deepcopy(self._tokenizer)
        self._encoding = threading.Lock()
        self._drafts = drafts
        self._kv = kv
        self._kept = KeptPrefix() if reuse else None
        self._missing = missing

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return has_template(self._encoder)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """See app.Served."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        with self._encoding:
            return tuple(encode_chat(self._encoder, turns, otherwise="ask /v1/completions instead"))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """See app.Served."""
        with self._encoding:
            return tuple(encode_text(self._encoder, text))

    def unavailable(self) -> str:
        """See app.Served."""
        missing = self._missing()
        return f"{missing} experts of the model are held by no peer that is there" if missing else ""

    def generate(self, work: Work, write: Callable[[str], None], halted: Callable[[], bool]) -> Outcome:
        """See engine.Generate."""
        made = continue_tokens(
            self._model,
            self._tokenizer,
            work.prompt,
            work.sampling,
            write,
            drafts=self._drafts,
            kv=self._kv,
            kept=self._kept,
            halted=halted,
            measured=False,
        )
        return Outcome(made.finish, Usage(made.prompt_tokens, len(made.tokens), made.reused_tokens))
