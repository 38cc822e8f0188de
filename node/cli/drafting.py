"""More tokens per visit: somebody drafts a few tokens, the model checks them all in one forward pass.

A swarm's model waits for the network once per MoE layer and pass, so drafts that are right divide that waiting. The
text stays the model's own: what it would not have chosen is thrown away. The method is transformers' assisted
generation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moehive.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOKUP = "lookup"


def check_draft(draft: str | None) -> None:
    """Raise ConfigError unless `draft` is "lookup", a directory, or None."""
    if draft is not None and draft != LOOKUP and not Path(draft).is_dir():
        raise ConfigError(
            f"--draft {draft} is neither {LOOKUP!r}, which drafts from what was said before, nor a model's directory"
        )


def drafting(model: PreTrainedModel, draft: str | None, tokens: int) -> dict[str, Any]:
    """What `generate` has to be told so that `tokens` tokens are drafted for each pass. Raises ConfigError."""
    if draft is None:
        return {}
    if getattr(model, "_is_stateful", False):
        raise ConfigError(f"--draft: {type(model).__name__} keeps a state that cannot go back to before a wrong draft")
    if draft == LOOKUP:
        return {"prompt_lookup_num_tokens": tokens}
    from transformers import AutoModelForCausalLM

    import moehive.swarm  # noqa: F401 - the draft may be a converted directory

    drafter = AutoModelForCausalLM.from_pretrained(draft, dtype="auto")
    ours, theirs = model.config.get_text_config().vocab_size, drafter.config.get_text_config().vocab_size
    if ours != theirs:
        raise ConfigError(f"--draft {draft} has a vocabulary of {theirs} tokens, the model one of {ours}")
    # transformers drafts fewer tokens where the draft is not sure of them; here one costs less than a visit.
    drafter.generation_config.num_assistant_tokens = tokens
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    drafter.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": drafter}
