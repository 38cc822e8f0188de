"""The Python client for programs that run an event loop: the same swarm, without ever blocking that loop.

    from moehive.swarm import join_async

    async with join_async(ticket) as swarm:
        model, tokenizer = await swarm.load(model_id)
        async for text in swarm.stream(model, tokenizer, "Once upon a time", max_tokens=64):
            print(text, end="")

A model's passes are transformers' own and block; they run in threads. Several may be under way at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.ticket import Ticket

from .client import DEFAULT_DISK_BUDGET, Swarm, join
from .dispatch.caller import CallSettings
from .text.sampling import Sampling, new_seed
from .threads import is_unwanted, to_its_end

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def join_async(
    ticket: str | Ticket,
    *,
    cache: Path | str | None = None,
    disk: int = DEFAULT_DISK_BUDGET,
    seeds: Sequence[str] = (),
    settings: CallSettings | None = None,
) -> AsyncSwarm:
    """As `join`; use it with `async with`."""
    return AsyncSwarm(join(ticket, cache=cache, disk=disk, seeds=seeds, settings=settings))


class AsyncSwarm:
    """A joined swarm. Made by `join_async`; an async context manager.

    What answers at once is at `swarm`: `stats`, `tier_stats`, `device_stats`, `missing`, `liars`, `check_counts`.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm

    async def __aenter__(self) -> Self:
        await to_its_end(self.swarm.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await to_its_end(self.swarm.__exit__, kind, error, trace)

    async def load(self, model: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """As `Swarm.load`, with its options."""
        return await to_its_end(self.swarm.load, model, **options)

    async def load_expert(self, model_id: str, layer: int, expert: int, **options: Any) -> dict[str, Tensor]:
        """As `Swarm.load_expert`, with its options."""
        return await to_its_end(self.swarm.load_expert, model_id, layer, expert, **options)

    async def holders(self, model_id: str) -> Mapping[PeerId, int]:
        """As `Swarm.holders`."""
        return await to_its_end(self.swarm.holders, model_id)

    async def coverage(self, model_id: str) -> Mapping[ExpertKey, tuple[PeerId, ...]]:
        """As `Swarm.coverage`."""
        return await to_its_end(self.swarm.coverage, model_id)

    async def stream(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> AsyncGenerator[str, None]:
        """The text after `prompt`, in pieces as it is made; of messages ({"role", "content"}) the answer.

        What is not said is as the model's generation_config.json has it; without one the likeliest token is taken. A
        `seed` makes it repeatable as long as nothing else in this process draws from torch's random numbers meanwhile,
        as another generation does. The text ends before any of `stop`. Who leaves early closes the generator
        (`contextlib.aclosing`), or is cancelled: the generation then ends with the layer or the token in progress.
        Raises ConfigError for a model without a tokenizer or chat template and for contradictions, and what the model's
        experts raise.
        """
        sampling = Sampling(
            max_tokens=max_tokens,
            seed=new_seed() if seed is None else seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=tuple(stop),
            with_stop=False,
        )
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()  # no more than max_tokens of them

        def write(text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        running = asyncio.create_task(to_its_end(_continue, model, tokenizer, prompt, sampling, write))
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str | Sequence[Mapping[str, str]],
    sampling: Sampling,
    write: Callable[[str], None],
) -> None:
    """In a thread."""
    from .text.generation import continue_tokens
    from .text.prompts import encode_chat, encode_text, need_tokenizer

    tokenizer = need_tokenizer(tokenizer)
    if isinstance(prompt, str):
        tokens = encode_text(tokenizer, prompt)
    else:
        tokens = encode_chat(tokenizer, prompt, otherwise="give the prompt as one text")
    continue_tokens(model, tokenizer, tokens, sampling, write, halted=is_unwanted)
