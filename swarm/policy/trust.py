"""Whether two computations of the same experts agree, and who is to blame where they do not.

Machines round differently, so answers are compared within a tolerance: the error of a row relative to its length. What
passes below it changes a token's hidden state by less than the model's own rounding does.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

# Of the Euclidean norm of a row, by the dtype of the answer. Kernels that round in different places (one row or
# several at a time, fp32 or bf16 in between) differ by up to 0.73 % in bf16, 0.062 % in fp16 and 0.00014 % in fp32,
# measured on layers of Qwen3-30B-A3B's, Phi-3.5-MoE's and DeepSeek-V3's shape; a margin of four to seven is left.
TOLERANCE: Mapping[str, float] = {"F32": 1e-5, "F16": 4e-3, "BF16": 3e-2}


class Verdict(enum.Enum):
    """What a spot check found."""

    AGREES = "agrees"
    DISPUTED = "disputed"  # two peers disagree, and nobody here can say who is right
    LIED = "lied"  # shown by computing it from verified weights
    UNCHECKED = "unchecked"  # nobody could compute it a second time


@dataclass(frozen=True, slots=True)
class Comparison:
    """Errors relative to what was computed again; None where that computation could not be had.

    Infinite where the answer is no number although the truth is one, NaN where the truth is none.
    """

    second_peer: float | None = None
    own: float | None = None  # against verified weights: this one is the truth
    second_peer_own: float | None = None  # the second peer's answer against them


def judge(comparison: Comparison, tolerance: float) -> Verdict:
    """The verdict on the peer whose answer is checked."""
    if comparison.own is not None:
        if math.isnan(comparison.own):  # an honest answer would overflow, too
            return Verdict.UNCHECKED
        return Verdict.AGREES if comparison.own <= tolerance else Verdict.LIED
    if comparison.second_peer is None:
        return Verdict.UNCHECKED
    return Verdict.AGREES if comparison.second_peer <= tolerance else Verdict.DISPUTED


def second_lied(comparison: Comparison, tolerance: float) -> bool:
    """Whether the second peer is shown to have computed wrongly."""
    return comparison.second_peer_own is not None and comparison.second_peer_own > tolerance
