"""Ending a generation before its first token: a long prompt is read for seconds, in a swarm for minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.modeling_layers import GradientCheckpointingLayer  # what transformers' decoder layers are

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Halted(Exception):
    """It was to end while the prompt was read. The cache holds a part of it, different in each layer: of no use."""


@contextmanager
def halting(model: PreTrainedModel, halted: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Within it the model asks `halted` before each layer and raises Halted, until what it yields is called."""

    def ask(layer: Any, arguments: Any) -> None:
        if halted():
            raise Halted

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(ask) for layer in layers]

    def end() -> None:
        while hooks:
            hooks.pop().remove()

    try:
        yield end
    finally:
        end()
