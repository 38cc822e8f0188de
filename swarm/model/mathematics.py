"""What an experts module of transformers computes, found out from the module itself. Imports no transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from moehive.kernels.expert_ffn import ACTIVATIONS, CLAMPED_INTERLEAVED, FfnSpec, apply_gate
from moehive.protocol.errors import UnsupportedModel

_ROWS, _WIDTH, _SPREAD = 16, 64, 6.0  # of the trial: wide enough to reach any clamp
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


def ffn_of(module: nn.Module) -> FfnSpec:
    """The mathematics of an experts module that transformers' `@use_experts_implementation` decorates.

    Recognised by what its gate makes of random numbers, not by names of classes, which differ between versions.
    Raises UnsupportedModel for anything that the kernels do not compute.
    """
    experts: Any = module
    refused = {
        "have no gate": not getattr(experts, "has_gate", True),
        "are normalised after each expert": getattr(experts, "has_post_expert_norm", False),
        "are quantised": any(p.dtype not in _FLOATS for p in experts.parameters(recurse=False)),
    }
    for reason, holds in refused.items():
        if holds:
            raise UnsupportedModel(f"{type(module).__name__}: its experts {reason}, which the kernels do not compute")
    trial = torch.randn(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(0)) * _SPREAD
    with torch.no_grad():
        wanted = experts._apply_gate(trial)  # [rows, width / 2]
        for spec in _candidates(experts):
            if torch.allclose(apply_gate(trial, spec), wanted, rtol=1e-5, atol=1e-6):
                return spec
    raise UnsupportedModel(f"{type(module).__name__} has a gate of its own, which the kernels do not compute")


def _candidates(experts: Any) -> Iterator[FfnSpec]:
    transposed = bool(experts.is_transposed)
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    if alpha is not None and limit is not None:
        yield FfnSpec(CLAMPED_INTERLEAVED, transposed=transposed, alpha=float(alpha), limit=float(limit))
    for activation in ACTIVATIONS:
        yield FfnSpec(activation=activation, transposed=transposed)
