"""What the hardware allows for one layer, and what of it is demanded.

Bytes are the weights of the experts that are hit, plus the activations: x read, h and y written and read, out written,
two bytes each. Work is that of the product with rows padded to whole blocks. The ceilings are measured on the machine:
the rate of a large copy, and of a large bf16 product. Demands are the "must" of the project's kernel reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Layer

FIXED = 40e-6  # seconds that a layer's five or six kernels may take besides their bytes
LARGE = 1e9  # bytes from which on the fixed cost must not show
FEW, MANY = 64, 256  # rows per active expert: below the first memory bounds, from the second on arithmetic does
_FOUR_BIT = 1.0  # bytes of a weight, below


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bandwidth: bytes per second, read plus written; rate: bf16 floating-point operations per second."""

    bandwidth: float
    rate: float


H200 = Ceilings(4.3e12, 790e12)


@dataclass(frozen=True, slots=True)
class Bound:
    """One layer on some tokens: what has to be moved and computed, and the seconds that either takes."""

    bytes: float
    flops: float
    padded_flops: float
    memory: float
    compute: float

    @property
    def ideal(self) -> float:
        """Seconds on hardware that does both at its ceiling at once."""
        return max(self.memory, self.compute)


def expected_active(layer: Layer, tokens: int) -> float:
    """Experts that tokens with independent choices hit."""
    return layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)


def bound(layer: Layer, tokens: int, active: float, padded_rows: float, ceilings: Ceilings) -> Bound:
    """`active` experts are hit; `padded_rows` is the sum over them of their rows rounded up to whole blocks."""
    rows = tokens * layer.top_k
    activations = 2 * (2 * tokens * layer.hidden + 2 * rows * layer.inner + 2 * rows * layer.hidden)
    moved = active * layer.expert_bytes + activations
    per_row = 6.0 * layer.hidden * layer.inner
    flops, padded = per_row * rows, per_row * padded_rows
    return Bound(moved, flops, padded, moved / ceilings.bandwidth, padded / ceilings.rate)


def demanded(layer: Layer, tokens: int, active: float, limits: Bound, ceilings: Ceilings) -> float:
    """Seconds that the layer must not exceed."""
    rows_per_expert = tokens * layer.top_k / active
    plain = layer.weight_bytes >= 2
    if rows_per_expert < FEW:
        share = 0.5 if layer.weight_bytes < _FOUR_BIT else 0.8 if limits.bytes >= LARGE else 0.85
        fixed = 0.0 if limits.bytes >= LARGE else FIXED
        return fixed + limits.bytes / (share * ceilings.bandwidth)
    cap = (0.55 if plain else 0.4) * ceilings.rate
    if rows_per_expert >= MANY:
        return limits.padded_flops / cap
    ideal_rate = limits.padded_flops / limits.ideal
    return limits.padded_flops / min(0.7 * ideal_rate, cap)
