"""One continuation of one prompt with a transformers model: streamed while it is made, and timed.

Knows nothing of swarms: the experts are the model's own matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from moehive.protocol.errors import ConfigError
from moehive.swarm.model.kv.cache import SpilledCache, kv_cache
from moehive.swarm.model.kv.fidelity import LogitError, logit_error
from moehive.swarm.model.kv.options import KvOptions
from moehive.swarm.model.kv.stats import KvStats

from .halting import Halted, halting
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
    if chat:
        tokens = encode_chat(tokenizer, [{"role": "user", "content": prompt}], otherwise="leave --chat out")
    else:
        tokens = encode_text(tokenizer, prompt)
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
    halted: Callable[[], bool] | None = None,
    measured: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Generated:
    """Continue tokens; `write` gets the text in pieces. Where `halted` says so it ends: after any token, and while the
    prompt is read after any layer.

    `drafts` is what drafting.drafting gives. Equal arguments and an equal model give equal text. With an approximate
    `kv` the beginning of the text is then read again, to measure what it changed, unless `measured` is false. `kept`
    serves this prompt and keeps what the next one may need; drafts, and a KV cache that is not transformers' own, do
    without it. Raises ConfigError for a prompt without tokens, and what the model's experts and its KV cache raise.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give at least one character")
    arguments = sampling.arguments() | {"pad_token_id": _padding(model, tokenizer)}
    _check_one_sequence(model)
    cache = _own_cache(model, kv or KvOptions(), len(prompt), arguments)
    if drafts or not _plain_cache(model, arguments):
        kept = None
    reused = _reuse(kept, prompt, arguments)
    said = _Text(tokenizer, len(prompt), sampling, write, halted, clock)
    torch.manual_seed(sampling.seed)
    started = clock()
    output = _generate(model, tokenizer, prompt, arguments | dict(drafts), said, halted)
    said.end()
    seconds = clock() - started
    if kept is not None and output is not None:
        kept.put(output.sequences[0].tolist(), output.past_key_values)
    return Generated(
        text=said.text,
        tokens=tuple(said.tokens),
        prompt_tokens=len(prompt),
        first_token_seconds=(said.first_token or started) - started,
        seconds=seconds,
        finish=_finish(model, said, sampling),
        reused_tokens=reused,
        **_report(model, output if measured else None, cache),
    )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    arguments: Mapping[str, Any],
    said: _Text,
    halted: Callable[[], bool] | None,
) -> Any:
    """What transformers' `generate` returns; None where it was halted while the prompt was read."""
    inputs = torch.tensor([list(prompt)], device=model.device)  # [1, T]
    call: Any = model.generate
    generate = partial(
        call,
        inputs,
        attention_mask=torch.ones_like(inputs),
        tokenizer=tokenizer,  # where the model's own generation_config.json has texts to stop at
        **arguments,
        stopping_criteria=StoppingCriteriaList([said]),
    )
    if halted is None:
        return generate()
    try:
        with halting(model, halted) as said.on_first_token:
            return generate()
    except Halted:
        said.was_halted = True
        return None


def _plain_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Whether the cache is the one that transformers makes where nobody says anything."""
    unsaid = "past_key_values" not in arguments and "prefill_chunk_size" not in arguments
    return unsaid and getattr(model.generation_config, "cache_implementation", None) is None


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
    """What a KV cache of ours has to say, measured on `output` [1, T] where it is approximate. It is closed."""
    if cache is None:
        return {}
    stats = cache.stats()
    cache.close()
    if cache.options.lossless or output is None:
        return {"kv": stats}
    checked = output[:, : max(_CHECKED, 2 * stats.block_tokens)]
    return {"kv": stats, "kv_error": logit_error(model, checked, cache.options)}


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A padding token for `generate`, which insists on one though a single sequence is never padded."""
    configured = model.generation_config.pad_token_id
    candidates = (configured, tokenizer.pad_token_id, 0)
    return next(int(token) for token in candidates if isinstance(token, int))


def _check_one_sequence(model: PreTrainedModel) -> None:
    """Raise ConfigError for a model that would write several texts at once."""
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(model.generation_config, name, None) or 1) > 1:
            raise ConfigError(f"the model's generation_config.json asks for {name}: one text at a time is made here")


def _finish(model: PreTrainedModel, said: _Text, sampling: Sampling) -> Finish:
    ends = model.generation_config.eos_token_id
    if said.stopped or (said.tokens and said.tokens[-1] in (ends if isinstance(ends, list) else [ends])):
        return "stop"
    if len(said.tokens) >= sampling.max_tokens:
        return "length"
    return "halted" if said.was_halted else "stop"  # by something else that its generation_config.json says


class _Text(StoppingCriteria):
    """Looks at the tokens after each step: text as soon as it can be decoded, the time of the first token, and whether
    that was all. A streamer would see them a step later.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        sampling: Sampling,
        write: Callable[[str], None],
        halted: Callable[[], bool] | None,
        clock: Callable[[], float],
    ) -> None:
        # What tidies up spaces would change text that was passed on already.
        self._decoder = TextDecoder(
            lambda tokens: str(
                tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
        )
        self._search = StopSearch(sampling.stop, with_stop=sampling.with_stop)
        self._seen = prompt_tokens
        self._write = write
        self._halted = halted or (lambda: False)
        self._clock = clock
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.first_token: float | None = None
        self.was_halted = False
        self.on_first_token: Callable[[], None] = lambda: None

    @property
    def stopped(self) -> bool:
        """Whether a text to stop at has come."""
        return self._search.found

    @property
    def text(self) -> str:
        """All that was passed on."""
        return "".join(self._pieces)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether the sequence input_ids [1, T] ends here: [1]. One token is new, or several where there are drafts."""
        if self.first_token is None:
            self.first_token = self._clock()
            self.on_first_token()
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        self.tokens += new
        self._pass_on(self._search.feed(self._decoder.feed(new)))
        self.was_halted = self._halted()
        return torch.full((1,), self.stopped or self.was_halted, device=input_ids.device)

    def end(self) -> None:
        """Nothing more comes: what was held back is text after all."""
        if not self.stopped:
            self._pass_on(self._search.feed(self._decoder.end()))
        self._pass_on(self._search.end())

    def _pass_on(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._write(text)
