"""A model whose `generate` says how many tokens it is about to compute: what an expert is worth depends on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from .mixing import M, mix_in

# Told about how many tokens one generation computes, prompts included; the context lasts as long as it does.
Generating = Callable[[int], AbstractContextManager[None]]

_GENERATING: Final = "moehive_generating"  # the attribute of a model
_USUAL_TOKENS: Final = 20  # new ones where nobody says: transformers' default


def tell_horizon(model: M, generating: Generating) -> M:
    """Let each call of `model.generate` be announced to `generating`; the same model."""
    setattr(model, _GENERATING, generating)
    return mix_in(model, _Tells)


class _Tells:
    """What `tell_horizon` puts before a model's class."""

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `generate`."""
        generating: Generating = getattr(self, _GENERATING)
        settings = (args[0] if args else kwargs.get("generation_config")) or self.generation_config  # type: ignore[attr-defined]
        with generating(tokens_of(settings, inputs, kwargs)):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]


def tokens_of(settings: Any, inputs: Any, kwargs: dict[str, Any]) -> int:
    """The most tokens that a generation computes, prompts included; drafts that are refused come on top.

    `settings` is its GenerationConfig, which `kwargs`, the named arguments of `generate`, override.
    """

    def said(name: str) -> Any:
        found = kwargs.get(name)
        return getattr(settings, name, None) if found is None else found

    named = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    prompt = next((one for one in named if one is not None), None)  # [B, S] or [B, S, H]
    sequences, length = (1, 1) if prompt is None else (int(prompt.shape[0]), int(prompt.shape[1]))
    cache = kwargs.get("past_key_values")
    fresh = length - (0 if cache is None else min(int(cache.get_seq_length()), length))
    new = said("max_new_tokens")
    if new is None:
        longest = said("max_length")  # prompt included
        new = _USUAL_TOKENS if longest is None else max(longest - length, 0)
    return sequences * max(said("num_beams") or 1, said("num_return_sequences") or 1) * (fresh + int(new))
