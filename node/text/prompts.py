"""Prompts as tokens: plain texts, and conversations as a model's chat template puts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from moehive.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]  # "role" and "content"

_NO_TOKENIZER: Final = "this model has no tokenizer: use it from Python, where generate takes token ids"


def need_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises ConfigError where a model has none."""
    if tokenizer is None:
        raise ConfigError(_NO_TOKENIZER)
    return tokenizer


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it knows how to put a conversation."""
    return bool(tokenizer.chat_template)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text to continue."""
    return list(tokenizer(text)["input_ids"])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, otherwise: str) -> list[int]:
    """The tokens of a conversation that the model is to answer. Raises ConfigError for a conversation that the template
    refuses, such as one with two users' messages in a row, and where there is no template; `otherwise` says what to do
    then.
    """
    from jinja2 import TemplateError

    if not has_template(tokenizer):
        raise ConfigError(f"this model's tokenizer has no chat template: {otherwise}")
    conversation: Any = [dict(message) for message in messages]
    try:
        encoded: Any = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made for, prompt and answer together; None where it does not say."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
