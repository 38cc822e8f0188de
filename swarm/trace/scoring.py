"""How well a policy does on a trace, beside those that everybody knows.

The measure is the share of uses that found their expert resident (and of layer calls that found all of theirs), under a
budget of so many experts. LRU is one list over all layers, in the order of use, as published curves have it (Liang et
al., "Not all models suit expert offloading", arXiv 2505.16056, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.baselines import Belady, Lfu
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.tiers.policy import Lru, Policy
from moehive.swarm.tiers.replay import Replay, replay

from .hindsight import Fitted, Hindsight, fit_halves
from .routing import RoutingTrace


@dataclass(frozen=True, slots=True)
class Scores:
    """One trace under one budget."""

    slots: int  # experts that fit
    lru: Replay
    lfu: Replay
    belady: Replay
    lfru: Replay

    @property
    def closed(self) -> float:
        """Which share of the way from LRU to Belady's optimum the policy goes; 0 where there is no way."""
        return self.share(self.lfru)

    def share(self, found: Replay) -> float:
        """The same of another replay of this trace under this budget."""
        gap = self.belady.hit_rate - self.lru.hit_rate
        return (found.hit_rate - self.lru.hit_rate) / gap if gap > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Marks:
    """The tiers' policy with more knowledge than there is, under the same budget (hindsight.py)."""

    fitted: Replay  # told what a fit to the trace's other half says: how far this trace's past tells its future
    foreseen: Replay  # and what the next layer uses, exactly: how far a perfect guess of that layer would help


def slots_of(trace: RoutingTrace, resident: float) -> int:
    """How many experts are the share `resident` of the model."""
    return max(1, round(resident * len(trace.layers) * trace.num_experts))


def score(trace: RoutingTrace, slots: int) -> Scores:
    """Replay a trace with room for `slots` experts under every policy."""
    steps = list(trace.steps())
    policies: dict[str, Policy[ExpertKey]] = {
        "lru": Lru(),
        "lfu": Lfu(),
        "belady": Belady(steps),
        "lfru": policy_for(trace.top_k),
    }
    return Scores(slots, **{name: replay(policy, steps, _one, slots) for name, policy in policies.items()})


def fits_of(trace: RoutingTrace) -> Sequence[Fitted]:
    """What `mark` needs of a trace, whatever the slots: it takes longer than a replay."""
    return [fit_halves(trace, others=others) for others in (False, True)]


def mark(trace: RoutingTrace, slots: int, fits: Sequence[Fitted]) -> Marks:
    """What may be hoped for with room for `slots` experts: the better one of the trace's `fits`."""
    steps = list(trace.steps())

    def best(ahead: int) -> Replay:
        told = [replay(Hindsight(trace, fit, ahead=ahead), steps, _one, slots) for fit in fits]
        return max(told, key=lambda found: found.hits)

    return Marks(fitted=best(0), foreseen=best(1))


def policy_for(top_k: int) -> Lfru[ExpertKey]:
    """The tiers' policy for keys that are experts."""
    return Lfru(_place, top_k=top_k)


def _place(key: ExpertKey) -> tuple[int, int]:
    return key.layer, key.expert


def _one(_: ExpertKey) -> int:
    return 1
