"""How tokens are chosen, and when an answer ends. Owns what the options for sampling mean to transformers."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from moehive.protocol.errors import ConfigError

MAX_SEED: Final = (1 << 32) - 1  # of those that are drawn where nobody names one


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. None leaves it to the model's generation_config.json; without one it is greedy."""

    max_tokens: int
    seed: int
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()  # texts after any of which it ends
    with_stop: bool = True  # whether that text belongs to the answer

    def arguments(self) -> dict[str, Any]:
        """In the terms of transformers' `generate`, without what is looked for in the text. Raises ConfigError for a
        contradiction.
        """
        chosen: dict[str, Any] = {"max_new_tokens": self.max_tokens}
        if not all(self.stop):
            raise ConfigError("--stop needs a text that is not empty")
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


def new_seed() -> int:
    """One that nobody can guess."""
    return secrets.randbelow(MAX_SEED + 1)
