"""One continuation of one prompt with a transformers model: streamed while it is made, and timed.

Knows nothing of swarms: the experts are the model's own matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from moehive.protocol.errors import ConfigError
from moehive.swarm.model.kv.cache import SpilledCache, kv_cache
from moehive.swarm.model.kv.fidelity import LogitError, logit_error
from moehive.swarm.model.kv.options import KvOptions
from moehive.swarm.model.kv.stats import KvStats

from .pieces import StopSearch, TextDecoder
from .prompts import encode_chat, encode_text, need_tokenizer
from .reuse import KeptPrefix
from .sampling import Sampling

_CHECKED = 512  # tokens on which an approximate KV cache is measured; more where a block is longer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_DRAFTS: Mapping[str, Any] = MappingProxyType({})

# "stop": by the model's own end or a text to stop at; "length": all tokens that were asked for; "halted": from outside
Finish = Literal["stop", "length", "halted"]


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made of a prompt."""

    text: str
    tokens: tuple[int, ...]  # without the prompt's
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
    finish: Finish = "length"
    reused_tokens: int = 0  # of the prompt, which were not computed anew
    kv: KvStats | None = None  # of a KV cache that is not transformers' own
    kv_error: LogitError | None = None  # of an approximate one

    @property
    def tokens_per_second(self) -> float:
        """Over all of it, the prompt included."""
        return len(self.tokens) / self.seconds


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    sampling: Sampling,
    write: Callable[[str], None],
    *,
    chat: bool = False,
    drafts: Mapping[str, Any] = _NO_DRAFTS,
    kv: KvOptions | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generated:
    """Continue `prompt`, or with `chat` answer it as the chat template puts it; otherwise as `continue_tokens`."""
    tokenizer = need_tokenizer(tokenizer)
    tokens = encode_chat(tokenizer, [{"role": "user", "content": prompt}]) if chat else encode_text(tokenizer, prompt)
    return continue_tokens(model, tokenizer, tokens, sampling, write, drafts=drafts, kv=kv, clock=clock)


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    write: Callable[[str], None],
    *,
    drafts: Mapping[str, Any] = _NO_DRAFTS,
    kv: KvOptions | None = None,
    kept: KeptPrefix | None = None,
    halted: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Generated:
    """Continue tokens; `write` gets the text in pieces, and after each token it ends where `halted` says so.

    `drafts` is what drafting.drafting gives. Equal arguments and an equal model give equal text. With an approximate
    `kv` the beginning of the text is then read again, to measure what it changed. `kept` serves this prompt and keeps
    what the next one may need; drafts, and a KV cache that is not transformers' own, do without it. Raises ConfigError
    for a prompt without tokens, and what the model's experts and its KV cache raise.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give at least one character")
    inputs = torch.tensor([list(prompt)], device=model.device)  # [1, T]
    arguments = sampling.arguments() | {"pad_token_id": _padding(model, tokenizer)}
    cache = _own_cache(model, kv or KvOptions(), len(prompt), arguments)
    if drafts or cache is not None or arguments.get("prefill_chunk_size"):
        kept = None
    reused = _reuse(kept, prompt, arguments)
    streamer = _Streamer(tokenizer, sampling, write, clock)
    torch.manual_seed(sampling.seed)
    started = clock()
    output: Any = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        **arguments,
        **drafts,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_Ended(lambda: streamer.stopped or halted())]),
    )
    seconds = clock() - started
    if kept is not None:
        kept.put(output.sequences[0].tolist(), output.past_key_values)
    return Generated(
        text=streamer.text,
        tokens=tuple(streamer.tokens),
        prompt_tokens=len(prompt),
        first_token_seconds=(streamer.first_token or started) - started,
        seconds=seconds,
        finish=_finish(model, streamer, sampling),
        reused_tokens=reused,
        **_report(model, output, cache),
    )


def _reuse(kept: KeptPrefix | None, prompt: Sequence[int], arguments: dict[str, Any]) -> int:
    """How many tokens of the prompt are there already; their cache is added to the arguments of `generate`."""
    if kept is None:
        return 0
    arguments["return_dict_in_generate"] = True
    cache, reused = kept.take(prompt)
    if cache is not None:
        arguments["past_key_values"] = cache
    return reused


def _own_cache(model: PreTrainedModel, kv: KvOptions, length: int, arguments: dict[str, Any]) -> SpilledCache | None:
    """The cache for a prompt of `length` tokens, also added to the arguments of `generate`; None: transformers' own."""
    if kv.chunk is not None and length > kv.chunk:
        arguments["prefill_chunk_size"] = kv.chunk
    if kv.mode == "full":
        return None
    cache = kv_cache(model, kv, max_tokens=length + arguments["max_new_tokens"])
    arguments["past_key_values"] = cache
    return cache


def _report(model: PreTrainedModel, output: Any, cache: SpilledCache | None) -> dict[str, Any]:
    """What a KV cache of ours has to say about `output` [1, T]. It is closed."""
    if cache is None:
        return {}
    stats = cache.stats()
    cache.close()
    if cache.options.lossless:
        return {"kv": stats}
    checked = output[:, : max(_CHECKED, 2 * stats.block_tokens)]
    return {"kv": stats, "kv_error": logit_error(model, checked, cache.options)}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A padding token for `generate`, which insists on one though a single sequence is never padded."""
    configured = model.generation_config.pad_token_id
    candidates = (configured, tokenizer.pad_token_id, 0)
    return next(int(token) for token in candidates if isinstance(token, int))


def _finish(model: PreTrainedModel, streamer: _Streamer, sampling: Sampling) -> Finish:
    ends = model.generation_config.eos_token_id
    if streamer.stopped or (streamer.tokens and streamer.tokens[-1] in (ends if isinstance(ends, list) else [ends])):
        return "stop"
    return "length" if len(streamer.tokens) >= sampling.max_tokens else "halted"


class _Ended(StoppingCriteria):
    """Asked after each token."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each sequence of input_ids [B, T] ends: [B]."""
        return torch.full((input_ids.shape[0],), self._ended(), device=input_ids.device)


class _Streamer(BaseStreamer):
    """Text as soon as it can be decoded, without the prompt and what comes after a text to stop at; remembers when the
    first token came.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        write: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        # What tidies up spaces would change text that was passed on already.
        self._decoder = TextDecoder(
            lambda tokens: str(
                tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
        )
        self._search = StopSearch(sampling.stop, with_stop=sampling.with_stop)
        self._write = write
        self._clock = clock
        self._prompt_seen = False
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.first_token: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether a text to stop at has come."""
        return self._search.found

    @property
    def text(self) -> str:
        """All that was passed on."""
        return "".join(self._pieces)

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T] first, then each token [1], or several [1, n] where there are drafts."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.stopped:
            return
        if self.first_token is None:
            self.first_token = self._clock()
        tokens = value.flatten().tolist()
        self.tokens += tokens
        self._pass_on(self._search.feed(self._decoder.feed(tokens)))

    def end(self) -> None:
        """Nothing more comes: what was held back is text after all."""
        if not self.stopped:
            self._pass_on(self._search.feed(self._decoder.end()))
        self._pass_on(self._search.end())

    def _pass_on(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._write(text)
