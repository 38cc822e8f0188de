"""What prefetch would have made of recorded tokens, on a link of a given speed and under a budget: without waiting.

The prefetcher is the real one, and so are the tier's bookkeeping and its policy; time and the link are simulated. The
link carries one load at a time. What a layer needs now goes before guesses that have not begun to load, and waits for
one that has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moehive.protocol.ids import ExpertKey
from moehive.swarm.tiers.policy import Policy, Uses
from moehive.swarm.tiers.residency import Residency, Speculation, Use

from .control import Limits
from .fitting import Routers, States
from .measure import Usefulness
from .predictors import Predictor
from .prefetcher import Prefetcher


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds: of one layer's attention, of one layer's experts, and of loading one expert at a token's number."""

    attention: float
    experts: float
    load: Callable[[int], float]
    slots: int  # experts that fit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay came to."""

    token_seconds: Sequence[float]
    stalled: float  # seconds that layers waited for experts, of all
    loads: int  # of experts, on guesses or not
    hit_rate: float  # of uses that found their expert resident when their layer began
    usefulness: Usefulness
    switched: Sequence[tuple[int, str]]  # tokens after which the mode changed, and to which

    @property
    def seconds(self) -> float:
        """Of all tokens."""
        return sum(self.token_seconds)


@dataclass(slots=True)
class _Transfer:
    key: ExpertKey
    begin: float
    end: float
    speculation: Speculation | None


@dataclass(slots=True)
class SimulatedTier:
    """A Shelf whose loads take simulated time; sizes are in experts. `now` is moved by whoever simulates."""

    policy: Policy[ExpertKey]
    slots: int
    load_seconds: float
    now: float = 0.0
    loads: int = 0
    stalled_seconds: float = 0.0
    held: Residency[ExpertKey, None] = field(init=False)
    _queue: list[_Transfer] = field(default_factory=list)  # in the order of the link

    def __post_init__(self) -> None:
        self.held = Residency(self.slots, self.policy)

    # --- Shelf ----------------------------------------------------------------------------------------------------

    def absent(self, layer: int, experts: Sequence[int]) -> Sequence[bool]:
        """See Shelf."""
        coming = {transfer.key for transfer in self._queue}
        keys = [ExpertKey(layer, expert) for expert in experts]
        return [key not in self.held.entries and key not in coming for key in keys]

    def prefetch(self, layer: int, ranked: Sequence[tuple[int, float]], most: int) -> int:
        """See Shelf."""
        self.held.want(layer, [ExpertKey(layer, expert) for expert, _ in ranked])
        started = 0
        for (expert, chance), missing in zip(ranked, self.absent(layer, [e for e, _ in ranked]), strict=True):
            if missing:
                key = ExpertKey(layer, expert)
                if started == most or not self.held.reserve_spare(key, 1, chance=chance):
                    break
                self._append(key, Speculation(started))
                started += 1
        return started

    def outcomes(self) -> Sequence[Speculation]:
        """See Shelf."""
        outcomes, self.held.outcomes = self.held.outcomes, []
        return outcomes

    # --- a layer's call -------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Time passes; what has arrived by then is resident."""
        self.now = now
        while self._queue and self._queue[0].end <= now:
            transfer = self._queue.pop(0)
            self._publish(transfer)

    def use(self, uses: Uses[ExpertKey]) -> tuple[Sequence[Use[ExpertKey, None]], float]:
        """A layer's entries, in use from now on, and when the last of them has arrived."""
        missing = self.held.note(uses)
        waiting = self._make_way(uses)
        ready = self.now
        for key in missing:
            under_way = next((transfer for transfer in self._queue if transfer.key == key), None)
            if under_way is None:
                assert self.held.reserve(key, 1), "a budget holds what one layer's call uses"
                under_way = self._append(key, None)
            ready = max(ready, under_way.end)
        held = [Use[ExpertKey, None](0)]
        self.held.acquire(uses.rows, held[0])
        for transfer in [transfer for transfer in self._queue if transfer.key in uses.rows]:
            self._queue.remove(transfer)
            self._busy = max(self._busy, transfer.end)
            held.append(Use(0))
            self._publish(transfer, held[-1:])
        for transfer in waiting:
            self._append(transfer.key, transfer.speculation)
        return held, ready

    def end(self, held: Sequence[Use[ExpertKey, None]]) -> None:
        """The call is over."""
        for use in held:
            self.held.release(use)

    # --- the link -------------------------------------------------------------------------------------------------

    _busy: float = 0.0  # until when the link carries what has left the queue already

    def _append(self, key: ExpertKey, speculation: Speculation | None) -> _Transfer:
        begin = max(self.now, self._busy, self._queue[-1].end if self._queue else 0.0)
        transfer = _Transfer(key, begin, begin + self.load_seconds, speculation)
        self._queue.append(transfer)
        return transfer

    def _make_way(self, uses: Uses[ExpertKey]) -> list[_Transfer]:
        """Take what has not begun off the link; what is left of it comes after what is needed now."""
        idle = [transfer for transfer in self._queue if transfer.begin > self.now]
        self._queue = [transfer for transfer in self._queue if transfer.begin <= self.now]
        for transfer in [t for t in idle if t.key.layer == uses.layer]:
            idle.remove(transfer)
            self.held.cancel(1)
        return idle

    def _publish(self, transfer: _Transfer, users: Sequence[Use[ExpertKey, None]] = ()) -> None:
        self.loads += 1
        speculation = transfer.speculation
        if speculation is not None:
            speculation.size, speculation.seconds = 1, self.load_seconds
            if users:
                self.held.settle(speculation, used=True, hidden=max(0.0, self.now - transfer.begin))
        self.held.publish(transfer.key, None, 1, users, speculation)


def replay(
    states: States,
    experts: NDArray[np.integer[Any]],
    layers: Sequence[int],
    predictor: Predictor | None,
    policy: Policy[ExpertKey],
    machine: Machine,
    limits: Limits | None = None,
    routers: Routers | None = None,
) -> Outcome:
    """Decode the recorded tokens, whose `experts` are [T, L, K], one by one. Without a predictor nothing is guessed.

    With `routers` it learns as it guesses.
    """
    tier = SimulatedTier(policy, machine.slots, machine.load(0))
    prefetcher = None
    if predictor is not None:
        prefetcher = Prefetcher(predictor, tier, layers, routers=routers, limits=limits, clock=lambda: tier.now)
    residuals, inputs = states.residuals.astype(np.float32), states.inputs.astype(np.float32)
    seconds: list[float] = []
    switched: list[tuple[int, str]] = []
    for token in range(len(experts)):
        began, tier.load_seconds = tier.now, machine.load(token)
        for column, layer in enumerate(layers):
            if prefetcher is not None:
                prefetcher.entering(layer, residuals[token : token + 1, column])
            tier.advance(tier.now + machine.attention)
            chosen = sorted(experts[token, column].tolist())
            uses = Uses(layer, {ExpertKey(layer, expert): 1 for expert in chosen})
            held, ready = tier.use(uses)
            if prefetcher is not None:
                prefetcher.computing(layer, inputs[token : token + 1, column], chosen)
            tier.stalled_seconds += ready - tier.now
            tier.advance(ready + machine.experts)
            tier.end(held)
        seconds.append(tier.now - began)
        if prefetcher is not None and (not switched or switched[-1][1] != prefetcher.state.mode.value):
            switched.append((token, prefetcher.state.mode.value))
    hits = [tier.held.counts(layer) for layer in layers]
    hit_rate = sum(counts.hits for counts in hits) / max(1, sum(counts.hits + counts.misses for counts in hits))
    usefulness = Usefulness() if prefetcher is None else prefetcher.usefulness
    return Outcome(seconds, tier.stalled_seconds, tier.loads, hit_rate, usefulness, switched)
