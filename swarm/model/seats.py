"""Experts modules of a transformers model, and who computes for them.

A seat is what stands on an experts module in place of its weights: the layer's number and a backend. Owns how such
modules are recognised, which must hold for every version of transformers we allow; imports none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn

from moehive.kernels.telemetry import LayerLoad, LoadStatistics
from moehive.protocol.errors import UnsupportedModel
from moehive.swarm.tiers.stats import TierStats

from .backend import ExpertsBackend, Tiered

NAME: Final = "moehive"  # of the quantizer and of the experts implementation
SEAT: Final = "moehive_seat"  # the attribute of an experts module
_WEIGHT = "gate_up_proj"  # a parameter that every supported experts module has
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(slots=True)
class Seat:
    """What an experts module knows. Without a backend until the model is loaded."""

    layer: int
    load: LayerLoad
    backend: ExpertsBackend | None = None


def attach_backend(model: nn.Module, backend: ExpertsBackend) -> None:
    """Let `backend` compute all routed experts of a model loaded from a converted directory; replaces the one it had.

    Raises UnsupportedModel for a model that keeps its experts itself.
    """
    seats = list(_seats(model))
    if not seats:
        raise UnsupportedModel("this model was not loaded from a converted directory: it keeps its experts itself")
    for seat in seats:
        seat.backend = backend


def backend_of(model: nn.Module) -> ExpertsBackend | None:
    """Who computes the routed experts of `model`; None where it keeps them itself."""
    return next((seat.backend for seat in _seats(model)), None)


def check_active(model: nn.Module) -> None:
    """Raise UnsupportedModel unless every experts module of `model` is served by a backend and holds no weight."""
    implementation = getattr(getattr(model, "config", None), "_experts_implementation", None)
    holding = experts_modules(model)
    served = [seat.backend is not None for seat in _seats(model)]
    if implementation != NAME or holding or not served or not all(served):
        raise UnsupportedModel(
            f"moehive is not active in this model (experts implementation {implementation!r}, {len(holding)} modules "
            "with expert weights); import moehive.swarm before loading, and load a converted directory"
        )


def tier_statistics(model: nn.Module) -> TierStats | None:
    """What the RAM tier of a model's experts has counted, where they are computed from this machine's disk."""
    backend = _tiered(model)
    return None if backend is None else backend.tier_stats


def device_statistics(model: nn.Module) -> TierStats | None:
    """What the tier in an accelerator's memory has counted, where the model has one."""
    backend = _tiered(model)
    return None if backend is None else backend.device_stats


def stored_statistics(model: nn.Module) -> TierStats | None:
    """What the part of RAM below that has counted, which holds experts as they are stored, where there is one."""
    backend = _tiered(model)
    return None if backend is None else backend.stored_stats


def _tiered(model: nn.Module) -> Tiered | None:
    backend: object = backend_of(model)
    return backend if isinstance(backend, Tiered) else None


def routing_statistics(model: nn.Module) -> dict[int, LoadStatistics]:
    """How evenly each layer's routed experts were chosen since `model` was loaded, by layer, ascending."""
    return {seat.layer: seat.load.statistics() for seat in sorted(_seats(model), key=lambda seat: seat.layer)}


def experts_modules(model: nn.Module) -> Mapping[int, nn.Module]:
    """Modules that transformers' `@use_experts_implementation` decorates and that still hold weights, by layer."""
    return {_layer_of(name): module for name, module in model.named_modules() if _is_experts(module)}


def routed_modules(model: nn.Module) -> Mapping[int, nn.Module]:
    """Experts modules by layer, whether they hold their weights or have a seat."""
    seated = {seat.layer: module for module in model.modules() if (seat := _seat(module)) is not None}
    return {**experts_modules(model), **seated}


def strip(module: nn.Module, layer: int) -> None:
    """Take an experts module's parameters away and leave a seat."""
    module._parameters.clear()
    # Else transformers' initialisation of what is missing from the checkpoint touches module.gate_up_proj.
    module._is_hf_initialized = True  # type: ignore[assignment]
    setattr(module, SEAT, Seat(layer, LayerLoad(int(module.num_experts))))  # type: ignore[arg-type]


def _is_experts(module: nn.Module) -> bool:
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and _WEIGHT in module._parameters


def _seats(model: nn.Module) -> Iterator[Seat]:
    for module in model.modules():
        if (seat := _seat(module)) is not None:
            yield seat


def _seat(module: nn.Module) -> Seat | None:
    seat = getattr(module, SEAT, None)
    return seat if isinstance(seat, Seat) else None


def _layer_of(name: str) -> int:
    match = _LAYER.search(name)
    if match is None:
        raise UnsupportedModel(f"experts module {name} is not in a numbered layer")
    return int(match[1])
