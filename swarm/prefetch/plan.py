"""How much to load on a guess: width and depth from what guesses turned out to be worth. Pure.

A guess says of some experts how likely they are used. Loading one that is used saves the seconds by which the load
started earlier; loading one that is not costs the seconds for which it is in the way of what is needed. Both follow
from the time that a load takes and from the lead, the time from the guess to the layer's call, which are measured. So a
link that is slow against the lead makes only sure guesses pay, and a slower one none: then loads are all that takes
time, and more of them than needed make it worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from .predictors import Point

EDGES: Final = (-1.2, -0.8, -0.5, -0.3, -0.15, 0.0, 0.15, 0.3, 0.5, 0.8, 1.2)  # of the margins (predictors.margins)
GRADES: Final = len(EDGES) + 1
_KEEP: Final = 0.999  # of what a profile knows, per guess: it forgets half in 700
_PRIOR_SEEN: Final = 8.0  # guesses' worth of belief before anything was measured
_BETTER: Final = 1.1  # times the gain that another depth must promise
NEVER: Final = 2.0  # a chance that nothing has


@dataclass(frozen=True, slots=True)
class Economy:
    """What loading on a guess meets, in seconds."""

    load: float  # that one load takes
    lead: float  # from the guess to the layer's call
    contention: float = 0.05  # share of a load in vain by which needed ones come later, besides what is seen below
    displaced: float = 0.05  # loads that one on a guess causes, because it takes the place of what is needed later

    def gain(self, chance: float, position: float = 0.0) -> float:
        """Seconds that one load saves on average, with `position` others before it on the same link."""
        lead = max(self.lead - position * self.load, 0.0)
        in_the_way = max(self.load - lead, 0.0) + self.contention * self.load
        return chance * min(self.load, lead) - (1 - chance) * in_the_way - self.displaced * self.load


def grade(margin: float) -> int:
    """The number of the class that a margin belongs to."""
    return sum(1 for edge in EDGES if margin >= edge)


def _prior(number: int) -> float:
    """The chance of a grade nobody has seen yet: modest, so that nothing is loaded on faith."""
    return 0.05 + 0.85 * number / (GRADES - 1)


@dataclass(slots=True)
class Profile:
    """Of one point: how many absent experts of each grade a guess names, and which share of them is used.

    Experts that are resident already do not count: loading them costs nothing, and they are guessed right more often.
    """

    seen: list[float] = field(default_factory=lambda: [0.0] * GRADES)
    used: list[float] = field(default_factory=lambda: [0.0] * GRADES)
    guesses: float = 0.0

    def learn(self, grades: Sequence[int], used: Sequence[bool]) -> None:
        """The absent experts that one guess named, and which of them the layer used."""
        self.seen = [value * _KEEP for value in self.seen]
        self.used = [value * _KEEP for value in self.used]
        self.guesses = self.guesses * _KEEP + 1
        for number, right in zip(grades, used, strict=True):
            self.seen[number] += 1
            self.used[number] += right

    def chance(self, number: int) -> float:
        """That an absent expert of this grade is used."""
        return (self.used[number] + _PRIOR_SEEN * _prior(number)) / (self.seen[number] + _PRIOR_SEEN)

    def per_guess(self, number: int) -> float:
        """Absent experts of this grade that a guess names."""
        return self.seen[number] / self.guesses if self.guesses else 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What prefetch may cost. wasted: share of its bytes. width: experts per guess beyond which nothing is loaded."""

    width: int
    wasted: float = 0.2  # planned for; it is switched off above a quarter (control.Limits)


@dataclass(frozen=True, slots=True)
class Plan:
    """From which chance on to load, by point; NEVER where a point is not used."""

    least: Mapping[Point, float]

    @property
    def depth(self) -> int:
        """Layers ahead, of the deepest point in use; -1: none is."""
        return max((point.ahead for point, least in self.least.items() if least <= 1), default=-1)


NOTHING: Final = Plan(dict.fromkeys(Point, NEVER))


def least_chance(profile: Profile, economy: Economy, bounds: Bounds) -> tuple[float, float]:
    """From which chance on loads pay and together waste no more than allowed; and the seconds that a guess then gains.

    Loads that gain are taken in the order of their chance, for as long as their expected waste stays within the bound.
    """
    least, total, loads, wasted = NEVER, 0.0, 0.0, 0.0
    for chance, number in sorted(((profile.chance(number), number) for number in range(GRADES)), reverse=True):
        count = min(profile.per_guess(number), bounds.width - loads)
        if count <= 0:
            continue
        # Judged by the first of its grade: how many there are before it differs from guess to guess.
        gain = economy.gain(chance, loads)
        loads, wasted = loads + count, wasted + count * (1 - chance)
        if gain <= 0 or wasted > bounds.wasted * loads:
            break
        least, total = chance, total + gain * count
    return least, total


def make_plan(
    profiles: Mapping[Point, Profile], economies: Mapping[Point, Economy], bounds: Bounds, now: Plan = NOTHING
) -> Plan:
    """The depth that gains most, with every point up to it; another than now only where that gains clearly more."""
    found = {point: least_chance(profiles[point], economies[point], bounds) for point in profiles}
    worth = {point.ahead: gain * (_BETTER if point.ahead == now.depth else 1.0) for point, (_, gain) in found.items()}
    depth = max(worth, key=lambda ahead: (worth[ahead], -ahead)) if worth else -1
    if worth.get(depth, 0.0) <= 0:
        return NOTHING
    return Plan({point: found[point][0] if point in found and point.ahead <= depth else NEVER for point in Point})


def choose(chances: Sequence[float], least: float, economy: Economy, width: int) -> int:
    """How many of the experts with these chances, best first, to load: the first so many."""
    count = 0
    for chance in chances[:width]:
        if chance < least or economy.gain(chance, count) <= 0:
            break
        count += 1
    return count
