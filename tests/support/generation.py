"""Greedy generation that is interrupted at a given token, for tests of what a swarm survives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

TOKENS = 24


class AtToken(BaseStreamer):  # type: ignore[misc]
    """Calls `action` once, between two tokens."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._left = number + 1  # the prompt comes first
        self._action = action
        self.done = False

    def put(self, value: Tensor) -> None:
        """See BaseStreamer."""
        self._left -= 1
        if self._left == 0:
            self._action()
            self.done = True

    def end(self) -> None:
        """See BaseStreamer."""


def prompt(seed: int = 7) -> Tensor:
    """Token ids [1, 12]."""
    return torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, *, at_token: int = 0, action: Callable[[], object] | None = None) -> list[int]:
    """TOKENS greedy tokens after `prompt()`; `action` is called after token `at_token`."""
    ids = prompt()
    streamer = AtToken(at_token, action) if action else None
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, streamer=streamer
    )
    assert streamer is None or streamer.done
    found: list[int] = tokens[0, ids.shape[1] :].tolist()
    return found


def reference_tokens(checkpoint: Path) -> list[int]:
    """What plain transformers generates from a checkpoint in fp32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, experts_implementation="eager")
    return generate(model)
