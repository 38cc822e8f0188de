"""One routed expert on its rows: two projections around a gate.

Owns the arithmetic, operation for operation what transformers' eager experts do, so that the result is equal bit for
bit. Knows no model class, no file and no routing: what differs between families stands in `FfnSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import ExpertMatrices, WeightFormat, WeightMatrix

CONCATENATED: Final = "concatenated"
CLAMPED_INTERLEAVED: Final = "clamped-interleaved"


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


# transformers' ACT2FN names; each computes what the ACT2FN module of that name computes
ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu_squared,
}


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """What the experts of one model compute.

    gate: "concatenated" ([gate; up] halves: act(gate) * up) or "clamped-interleaved" (GPT-OSS: gate and up alternate,
      (up + 1) * gate * sigmoid(alpha * gate), gate clamped above and up on both sides at `limit`; no activation name).
    transposed: weights are [in, out] and applied as x @ W, instead of [out, in] as in torch's linear.

    Raises ValueError for a gate or an activation that is not known.
    """

    gate: str = CONCATENATED
    activation: str = "silu"
    transposed: bool = False
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.gate == CLAMPED_INTERLEAVED:
            if self.alpha is None or self.limit is None:
                raise ValueError(f"gate {self.gate!r} needs alpha and limit, got {self.alpha} and {self.limit}")
        elif self.gate != CONCATENATED:
            raise ValueError(f"unknown gate {self.gate!r}, not one of {[CONCATENATED, CLAMPED_INTERLEAVED]}")
        elif self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}, not one of {sorted(ACTIVATIONS)}")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """One expert's weights in the form they are computed with; all of one floating dtype.

    gate_up: [2I, H], or transposed [H, 2I]; interleaved where the spec says so.
    down: [H, I], or transposed [I, H].
    gate_up_bias: [2I], down_bias: [H], or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights that are there."""
        return tuple(t for t in (self.gate_up, self.down, self.gate_up_bias, self.down_bias) if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def matrices(self, spec: FfnSpec) -> ExpertMatrices:
        """The same weights with outputs as rows, as views. Raises ValueError where they do not fit each other."""
        gate_up, down = (
            WeightMatrix(WeightFormat.PLAIN, weight.t() if spec.transposed else weight)
            for weight in (self.gate_up, self.down)
        )
        return ExpertMatrices(gate_up, down, self.gate_up_bias, self.down_bias)

    def to(self, device: torch.device) -> ExpertWeights:
        """These weights on `device`; themselves where they are there already."""
        if self.gate_up.device == device:
            return self
        biases = (None if bias is None else bias.to(device) for bias in (self.gate_up_bias, self.down_bias))
        return ExpertWeights(self.gate_up.to(device), self.down.to(device), *biases)


def expert_ffn(rows: Tensor, weights: ExpertWeights, spec: FfnSpec) -> Tensor:
    """The expert's unweighted output [R, H] for `rows` [R, H] of the weights' dtype; R may be 0."""
    gate_up = _project(rows, weights.gate_up, weights.gate_up_bias, spec.transposed)  # [R, 2I]
    return _project(apply_gate(gate_up, spec), weights.down, weights.down_bias, spec.transposed)  # [R, H]


def apply_gate(gate_up: Tensor, spec: FfnSpec) -> Tensor:
    """What stands between the two projections: [R, 2I] -> [R, I]."""
    return _clamped_gate(gate_up, spec) if spec.gate == CLAMPED_INTERLEAVED else _gate(gate_up, spec)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = x @ weight if transposed else F.linear(x, weight)
    return y if bias is None else y + bias  # apart from the product, as eager does: one more rounding in bf16


def _gate(gate_up: Tensor, spec: FfnSpec) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)  # [R, I] each
    return ACTIVATIONS[spec.activation](gate) * up


def _clamped_gate(gate_up: Tensor, spec: FfnSpec) -> Tensor:
    """transformers, `GptOssExperts._apply_gate`."""
    assert spec.alpha is not None
    assert spec.limit is not None
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]  # [R, I] each
    gate = gate.clamp(max=spec.limit)
    up = up.clamp(min=-spec.limit, max=spec.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * spec.alpha))
