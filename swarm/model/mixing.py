"""Behaviour put before the class of one loaded model, such as something that its `generate` does besides."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)


def mix_in(model: M, mixin: type) -> M:
    """Make `model` an instance of `mixin`, too, if it is none yet; the same model.

    By a subclass rather than a function on the model: that would refer to the model, which then is freed late.
    """
    kind = type(model)
    if not issubclass(kind, mixin):
        model.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    return model
