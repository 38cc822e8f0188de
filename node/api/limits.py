"""How long prompts and answers may be, and what a request's wishes mean for one generation. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moehive.swarm.text.sampling import Sampling, new_seed

from .errors import ApiError, bad_request
from .schema import Wishes

_WITHOUT_CONTEXT: Final = 4096  # tokens of an answer where neither request nor model nor server bounds it
_COLD: Final = 1e-8  # any other token's share is too small for a float32; so say clients that cannot say 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model on one server."""

    context: int | None  # tokens of prompt and answer together
    vocabulary: int
    max_tokens: int | None = None  # of one answer


def sampling_of(wishes: Wishes, prompt: tuple[int, ...], limits: Limits) -> Sampling:
    """For a prompt of these tokens. Raises ApiError where it cannot be as wished: nothing is cut."""
    if not prompt:
        raise bad_request("the prompt is empty")
    if max(prompt) >= limits.vocabulary:
        raise bad_request(f"the prompt has a token that the model has not: {max(prompt)}", "prompt")
    # Whatever top_p and top_k say: the likeliest token is among the likeliest.
    greedy = wishes.temperature is not None and wishes.temperature <= _COLD
    return Sampling(
        max_tokens=_max_tokens(wishes.max_tokens, wishes.usual_tokens, len(prompt), limits),
        seed=new_seed() if wishes.seed is None else wishes.seed,
        temperature=0.0 if greedy else wishes.temperature,
        top_k=None if greedy else wishes.top_k,
        top_p=None if greedy else wishes.top_p,
        stop=wishes.stop,
        with_stop=False,
    )


def _max_tokens(wished: int | None, usual: int | None, prompt: int, limits: Limits) -> int:
    left = None if limits.context is None else limits.context - prompt
    if left is not None and (left < 1 or (wished or 1) > left):
        raise _too_long(wished, prompt, limits)
    if wished is not None and limits.max_tokens is not None and wished > limits.max_tokens:
        raise bad_request(f"this server gives at most {limits.max_tokens} tokens for an answer", "max_tokens")
    if wished is not None:
        return wished
    return min((bound for bound in (usual, left, limits.max_tokens) if bound is not None), default=_WITHOUT_CONTEXT)


def _too_long(wished: int | None, prompt: int, limits: Limits) -> ApiError:
    asked = f", and {wished} more are asked for" if wished else ""
    return bad_request(
        f"this model's maximum context length is {limits.context} tokens; the prompt has {prompt}{asked}",
        "max_tokens" if wished and prompt < (limits.context or 0) else None,
        code="context_length_exceeded",
    )
