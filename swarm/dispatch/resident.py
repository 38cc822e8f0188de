"""The experts that a client keeps: fetched in the background where that pays, computed here from then on.

What to fetch is decided by policy/fetch_or_send.py from what is counted here; who leaves a full tier is the tier's own
policy. Counting happens on the model's thread, fetching on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.routing import Assignment
from moehive.protocol.errors import BudgetTooSmall, SwarmError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest
from moehive.swarm.log import get_logger
from moehive.swarm.model.device import DeviceExperts
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.policy.fetch_or_send import LayerFacts, experts_to_fetch
from moehive.swarm.prefetch.session import PROMPT, begin_session
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.stats import TierStats

from .request import LayerInput, Part
from .weights import SwarmWeights

EVERY = 0.25  # seconds between looks at what could be fetched
HALVE_AFTER = 1024.0  # tokens after which older uses count half
FIRST_RATE = 50e6  # bytes per second assumed of the link before anything was fetched
FETCH_TIMEOUT = 60.0
_SMOOTHING = 0.2
_log = get_logger(__name__)

ExpertLease = AbstractContextManager[ExpertWeights]


@dataclass(slots=True)
class _LayerCounts:
    uses: Counter[int] = field(default_factory=Counter)
    tokens: float = 0.0
    seen: int = 0  # tokens, none forgotten
    paid: float = 0.0  # seconds waited since an expert was last fetched for it
    changed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Generation:
    before: int  # tokens seen when it began
    tokens: int  # that it computes at most


class ResidentExperts:
    """Experts of one model in this client's memory. `run()` fetches until cancelled."""

    def __init__(
        self,
        manifest: Manifest,
        weights: SwarmWeights,
        tier: WeightsTier,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manifest = manifest
        self._weights = weights
        self.tier = tier
        self._device: DeviceExperts | None = None
        self._expected = 0  # tokens in all, as far as the caller has said
        self._generations: list[_Generation] = []  # that are going on
        self._clock = clock
        self._layers: dict[int, _LayerCounts] = {}
        self._lock = threading.Lock()  # of the counts
        self._dtype: torch.dtype | None = None  # that the model computes in, once it was seen
        self._wait = 0.0  # seconds, smoothed
        self._seconds_per_byte = 1.0 / FIRST_RATE
        self.fetched = 0  # experts
        self.fetched_bytes = 0

    @property
    def device_stats(self) -> TierStats | None:
        """Of those that are in an accelerator's memory, too; None without one."""
        return None if self._device is None else self._device.device_stats

    @property
    def tier_stats(self) -> TierStats:
        """Of the experts that are kept. A miss is a use that a peer computed; a load, an expert that was fetched."""
        return self.tier.stats

    # --- the model's thread ---------------------------------------------------------------------------------------

    def expect(self, tokens: int) -> None:
        """So many more tokens will be computed, about: what an expert is worth depends on it."""
        with self._lock:
            self._expected = max(self._expected, self._seen()) + tokens

    @contextmanager
    def generating(self, tokens: int) -> Iterator[None]:
        """A generation goes on that computes so many tokens at most; where `expect` was told more, that counts."""
        with self._lock:
            generation = _Generation(self._seen(), tokens)
            self._generations.append(generation)
        try:
            yield
        finally:
            with self._lock:
                self._generations.remove(generation)

    def _seen(self) -> int:
        return max((counts.seen for counts in self._layers.values()), default=0)

    def use_device(self, device: DeviceExperts) -> None:
        """From now on keep what is used in the memory of `device`, too, and compute it there. Its RAM tier is ours."""
        self._device = device

    def abandon(self, error: BaseException) -> None:
        """See RamTier.abandon."""
        (self._device or self.tier).abandon(error)

    def close(self) -> None:
        """End the threads of the tiers."""
        (self._device or self.tier).close()

    def begin(self, layer: int, assignments: Sequence[Assignment], tokens: int, dtype: torch.dtype) -> None:
        """A layer call begins, whose leases come next."""
        if self._device is not None:
            self._device.note(layer, {one.expert: one.token.shape[0] for one in assignments}, tokens, dtype)

    def lease(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertLease | None:
        """A resident expert's weights, to be entered once; None where it is not here."""
        key = ExpertKey(layer, expert)
        if self._device is not None and (there := self._device.try_lease(key, dtype)) is not None:
            return there
        lease = self.tier.try_lease((key, dtype))
        if lease is not None and self._device is not None:
            self._device.upload(key, dtype)  # for its next use: this one is computed with what is here
        return lease

    def part(self, call: LayerInput, assignment: Assignment, weights: ExpertWeights) -> Part:
        """One expert's part of a call, computed here."""
        return self._weights.part(call, assignment, weights)

    def saw(
        self, layer: int, assignments: Sequence[Assignment], tokens: int, dtype: torch.dtype, waited: float
    ) -> None:
        """Count one layer call: which experts its tokens chose, and the seconds that it waited for peers."""
        self._dtype = dtype
        rows = {(ExpertKey(layer, one.expert), dtype): one.token.shape[0] for one in assignments}
        self.tier.note(Uses(layer, rows, tokens), ahead=False)
        with self._lock:
            counts = self._layers.setdefault(layer, _LayerCounts())
            if tokens >= PROMPT:
                uses, counts.tokens = begin_session(counts.uses, counts.tokens)
                counts.uses = Counter(uses)
            for assignment in assignments:
                counts.uses[assignment.expert] += assignment.token.shape[0]
            counts.tokens += tokens
            counts.seen += tokens
            counts.paid += waited
            counts.changed = True
            if counts.tokens >= HALVE_AFTER:
                counts.tokens /= 2
                counts.uses = Counter({expert: uses / 2 for expert, uses in counts.uses.items()})
            if waited > 0 and tokens == 1:
                self._wait = self._wait + _SMOOTHING * (waited - self._wait) if self._wait else waited

    # --- the event loop -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fetch what pays, for ever."""
        while True:
            for key in self.worth_fetching():
                if not await self._fetch(key):
                    break
            await asyncio.sleep(EVERY)

    def worth_fetching(self) -> list[ExpertKey]:
        """What the policy would fetch now, of the layers that were used since it was last asked."""
        if self._dtype is None:
            return []
        with self._lock:
            layers = {layer: counts for layer, counts in self._layers.items() if counts.changed}
            chosen = []
            for layer, counts in layers.items():
                counts.changed = False
                chosen += [ExpertKey(layer, expert) for expert in experts_to_fetch(self._facts(layer, counts))]
        return chosen

    def _facts(self, layer: int, counts: _LayerCounts) -> LayerFacts:
        assert self._dtype is not None
        in_ram = self.tier.keys()
        on_device = () if self._device is None else self._device.tier.keys()
        here = {*on_device, *(key for key, _ in in_ram)}
        resident = {key.expert for key in here if key.layer == layer}
        size = self._weights.nbytes(self._dtype)
        return LayerFacts(
            uses=counts.uses,
            tokens=counts.tokens,
            experts=self._manifest.model.num_experts,
            resident=resident,
            wait=self._wait,
            price=self._shard_bytes(layer) * self._seconds_per_byte,
            horizon=self._to_come(counts.seen),
            paid=counts.paid,
            room=(self.tier.budget_bytes - self.tier.resident_bytes) // size,
        )

    def _to_come(self, seen: int) -> int | None:
        """Tokens to come in a layer that has seen so many; None where nobody has said anything.

        The rest of the generations that go on; and since others may follow, as many as came before them (Lindy's law):
        a session of many short ones then fetches at last what it waits for again and again.
        """
        to_come = self._expected - seen
        if self._generations:
            before = min(each.before for each in self._generations)
            left = max(sum(each.tokens for each in self._generations) - (seen - before), 0)
            to_come = max(to_come, left + before)
        return to_come if to_come > 0 else None

    def _shard_bytes(self, layer: int) -> int:
        return max((shard.size for key, shard in self._manifest.experts.items() if key.layer == layer), default=0)

    async def _fetch(self, key: ExpertKey) -> bool:
        """Get one expert; whether to go on with others."""
        assert self._dtype is not None
        dtype, size = self._dtype, self._manifest.experts[key].size
        started = self._clock()
        try:
            async with self._weights.load(key, dtype, started + FETCH_TIMEOUT) as fetched:
                seconds = self._clock() - started
                if fetched.room is not None:
                    self.tier.put(fetched.room, fetched.take(), seconds)
        except (SwarmError, BudgetTooSmall) as error:
            _log.info("an expert could not be fetched in the background", expert=str(key), reason=str(error))
            return False
        measured = seconds / size
        self._seconds_per_byte += (_SMOOTHING if self.fetched else 1.0) * (measured - self._seconds_per_byte)
        self.fetched += 1
        self.fetched_bytes += size
        with self._lock:
            self._layers[key.layer].paid = 0.0
        return True
