"""The routers of a transformers model as plain arrays: what predictors are made of.

A router stands beside the experts in its layer's sparse block, with a weight [E, H]; the norm before it belongs to the
decoder layer. Names differ between families, so both are found by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from moehive.protocol.errors import UnsupportedModel
from moehive.swarm.model.seats import routed_modules

from .fitting import Router
from .history import Floats

DECODER_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)$")
_NORMS: Final = ("post_attention_layernorm", "pre_feedforward_layernorm")
_CORRECTION: Final = "e_score_correction_bias"


def routers_of(model: nn.Module) -> Mapping[int, Router]:
    """Every layer's router. Raises UnsupportedModel where one cannot be found."""
    experts = routed_modules(model)
    blocks = decoder_layers(model)
    return {layer: _router(layer, blocks.get(layer), module) for layer, module in sorted(experts.items())}


def decoder_layers(model: nn.Module) -> Mapping[int, nn.Module]:
    """Decoder layers by number."""
    found = ((DECODER_LAYER.search(name), module) for name, module in model.named_modules())
    return {int(match[1]): module for match, module in found if match is not None}


def _router(layer: int, block: nn.Module | None, experts: nn.Module) -> Router:
    count = int(experts.num_experts)  # type: ignore[arg-type]
    for module in _beside(block, experts):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == count:
            assert block is not None
            return Router(
                weight=_array(weight),
                offset=_vector(module, "bias", count),
                gain=_gain(block, weight.shape[1]),
                correction=_vector(module, _CORRECTION, count) if hasattr(module, _CORRECTION) else None,
            )
    raise UnsupportedModel(f"the router of layer {layer} was not found, so that its experts cannot be predicted")


def _beside(block: nn.Module | None, experts: nn.Module) -> Iterator[nn.Module]:
    """Modules of the block in which `experts` stands, without it and what it contains."""
    for parent in block.modules() if block is not None else ():
        if any(child is experts for child in parent.children()):
            yield from (child for child in parent.children() if child is not experts)


def _gain(block: nn.Module, hidden_size: int) -> Floats:
    """What the norm before the router multiplies a state of mean square 1 with, whatever its weight means by itself."""
    norm = next((found for name in _NORMS if (found := getattr(block, name, None)) is not None), None)
    if norm is None:
        return np.ones(hidden_size, dtype=np.float32)
    if isinstance(norm, nn.LayerNorm):  # takes the mean off: what it makes of ones would be nothing
        return _array(norm.weight)
    weight = norm.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        return _array(norm(torch.ones(1, hidden_size, dtype=weight.dtype, device=weight.device))[0])


def _vector(module: nn.Module, name: str, count: int) -> Floats:
    found = getattr(module, name, None)
    return _array(found) if isinstance(found, Tensor) else np.zeros(count, dtype=np.float32)


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().to("cpu", torch.float32).numpy()
