"""One continuation of one prompt with a transformers model: streamed while it is made, and timed.

Owns what the options for sampling mean. Knows nothing of swarms: the experts are the model's own matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from moehive.protocol.errors import ConfigError
from moehive.swarm.model.kv.cache import SpilledCache, kv_cache
from moehive.swarm.model.kv.fidelity import LogitError, logit_error
from moehive.swarm.model.kv.options import KvOptions
from moehive.swarm.model.kv.stats import KvStats

_CHECKED = 512  # tokens on which an approximate KV cache is measured; more where a block is longer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_DRAFTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. None leaves it to the model's generation_config.json; without one it is greedy."""

    max_tokens: int
    seed: int
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()  # texts after any of which it ends

    def arguments(self) -> dict[str, Any]:
        """In the terms of transformers' `generate`. Raises ConfigError for a contradiction."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_tokens}
        if not all(self.stop):
            raise ConfigError("--stop needs a text that is not empty")
        if self.stop:
            chosen["stop_strings"] = list(self.stop)
        if self.temperature == 0:
            for option, value in (("--top-k", self.top_k), ("--top-p", self.top_p)):
                if value is not None:
                    raise ConfigError(
                        f"{option} means nothing with --temperature 0: it always takes the likeliest token"
                    )
            return chosen | {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if self.temperature is not None:
            chosen |= {"do_sample": True, "temperature": self.temperature}
        if self.top_k is not None:
            chosen |= {"do_sample": True, "top_k": self.top_k}
        if self.top_p is not None:
            chosen |= {"do_sample": True, "top_p": self.top_p}
        return chosen


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made of a prompt."""

    text: str
    tokens: tuple[int, ...]  # without the prompt's
    prompt_tokens: int
    first_token_seconds: float
    seconds: float
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
    """Continue `prompt`, or with `chat` answer it as the chat template puts it; `write` gets the text in pieces.

    `drafts` is what drafting.drafting gives. Equal arguments and an equal model give equal text. With an approximate
    `kv` the beginning of the text is then read again, to measure what it changed. Raises ConfigError for a prompt or a
    tokenizer that cannot be used, and what the model's experts and its KV cache raise.
    """
    if tokenizer is None:
        raise ConfigError("this model has no tokenizer: use it from Python, where generate takes token ids")
    inputs = _encode(tokenizer, prompt, chat, model.device)  # [1, T] each
    length = inputs["input_ids"].shape[1]
    arguments = sampling.arguments() | {"pad_token_id": _padding(model, tokenizer)}
    cache = _own_cache(model, kv or KvOptions(), length, arguments)
    streamer = _Streamer(tokenizer, write, clock)
    torch.manual_seed(sampling.seed)
    started = clock()
    output = model.generate(**inputs, **arguments, **drafts, tokenizer=tokenizer, streamer=streamer)  # type: ignore[operator]
    seconds = clock() - started
    tokens = tuple(output[0, length:].tolist())
    return Generated(
        text=str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
        tokens=tokens,
        prompt_tokens=length,
        first_token_seconds=(streamer.first_token or started) - started,
        seconds=seconds,
        **_report(model, output, cache),
    )


def _own_cache(model: PreTrainedModel, kv: KvOptions, length: int, arguments: dict[str, Any]) -> SpilledCache | None:
    """The cache for a prompt of `length` tokens, also added to the arguments of `generate`; None: transformers' own."""
    if kv.chunk is not None and length > kv.chunk:
        arguments["prefill_chunk_size"] = kv.chunk
    if kv.mode == "full":
        return None
    cache = kv_cache(model, kv, max_tokens=length + arguments["max_new_tokens"])
    arguments["past_key_values"] = cache
    return cache


def _report(model: PreTrainedModel, output: Tensor, cache: SpilledCache | None) -> dict[str, Any]:
    """What a KV cache of ours has to say about `output` [1, T]. It is closed."""
    if cache is None:
        return {}
    stats = cache.stats()
    cache.close()
    if cache.options.lossless:
        return {"kv": stats}
    checked = output[:, : max(_CHECKED, 2 * stats.block_tokens)]
    return {"kv": stats, "kv_error": logit_error(model, checked, cache.options)}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, device: torch.device) -> dict[str, Tensor]:
    encoded: Any  # a BatchEncoding; what the chat template gives is typed as anything that it can give
    if chat:
        if not tokenizer.chat_template:
            raise ConfigError("this model's tokenizer has no chat template: leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt is empty: give at least one character")
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A padding token for `generate`, which insists on one though a single sequence is never padded."""
    configured = model.generation_config.pad_token_id
    candidates = (configured, tokenizer.pad_token_id, 0)
    return next(int(token) for token in candidates if isinstance(token, int))


class _Streamer(TextStreamer):
    """Text as soon as it can be decoded, without the prompt; remembers when the first token came."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._clock = clock
        self.first_token: float | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T] first, then each token [1]."""
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = self._clock()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on what will not change any more."""
        if text:
            self._write(text)
