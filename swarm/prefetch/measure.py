"""What guesses turned out to be worth, as numbers that say it: recall, precision, bytes, and seconds hidden.

Never "accuracy": of 128 experts that a token could use it uses 8, so that naming none is right in 94 % of the cases.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .predictors import Point


@dataclass(slots=True)
class GuessCounts:
    """The guesses at one point whose layer was computed since. A guess ranks experts; it wants the first so many."""

    guesses: int = 0
    used: int = 0  # experts that the tokens used
    hits: int = 0  # of these, among the k first, where a token uses k
    wanted: int = 0  # experts that guesses wanted, resident or not
    wanted_hits: int = 0
    lead_seconds: float = 0.0  # from guess to call, over all guesses

    def add(self, ranked: Sequence[int], width: int, used: Collection[int], lead: float) -> None:
        """One guess that wanted the `width` first of `ranked`; its layer used `used`, `lead` seconds later."""
        self.guesses += 1
        self.used += len(used)
        self.hits += sum(1 for expert in ranked[: len(used)] if expert in used)
        self.wanted += width
        self.wanted_hits += sum(1 for expert in ranked[:width] if expert in used)
        self.lead_seconds += lead

    @property
    def recall_at_k(self) -> float:
        """Share of the used experts that are among the k first."""
        return self.hits / max(1, self.used)

    @property
    def recall_at_width(self) -> float:
        """Share of the used experts that guesses wanted."""
        return self.wanted_hits / max(1, self.used)

    @property
    def precision(self) -> float:
        """Share of the wanted experts that were used by the call they were wanted for."""
        return self.wanted_hits / max(1, self.wanted)

    @property
    def width(self) -> float:
        """Experts wanted per guess."""
        return self.wanted / max(1, self.guesses)

    @property
    def lead(self) -> float:
        """Seconds from guess to call."""
        return self.lead_seconds / max(1, self.guesses)


@dataclass(slots=True)
class Usefulness:
    """All points, and what became of the loads that guesses began."""

    points: dict[Point, GuessCounts] = field(default_factory=lambda: {point: GuessCounts() for point in Point})
    loads: int = 0
    used_bytes: int = 0  # of loads whose expert was used before it left
    wasted_bytes: int = 0  # of loads whose expert left unused
    hidden_seconds: float = 0.0  # of loading that nobody waited for
    switched_off: int = 0  # times
    failed_guesses: int = 0  # for which nothing could be computed or begun

    @property
    def wasted(self) -> float:
        """Share of the bytes whose fate is known; 0 where there are none."""
        return self.wasted_bytes / max(1, self.used_bytes + self.wasted_bytes)
