"""Which experts this node is asked for: rows per second over the last minutes, for placement (rebalance.py)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from moehive.protocol.ids import ExpertKey
from moehive.protocol.messages import MAX_DEMAND, Demand

MEMORY: Final = 600.0  # seconds after which a row counts 1/e: placement follows what lasts, not a prompt
_MOST_HOURLY: Final = 1 << 40


class DemandMeter:
    """Rows that were asked for, forgotten by and by. Used on the event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows: dict[ExpertKey, tuple[float, float]] = {}  # decayed rows, and when they were that many

    def asked(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> None:
        """Count a request for experts of a layer that are held here, `counts` rows of each."""
        now = self._clock()
        for expert, rows in zip(experts, counts, strict=True):
            key = ExpertKey(layer, expert)
            self._rows[key] = (self._decayed(key, now) + rows, now)

    def rates(self) -> Mapping[ExpertKey, float]:
        """Rows per second of each expert that was ever asked for."""
        now = self._clock()
        return {key: self._decayed(key, now) / MEMORY for key in self._rows}

    def message(self) -> Demand:
        """What a peer is told: the experts that are asked for most."""
        most = sorted(self.rates().items(), key=lambda entry: -entry[1])[:MAX_DEMAND]
        return Demand(
            layers=tuple(key.layer for key, _ in most),
            experts=tuple(key.expert for key, _ in most),
            hourly=tuple(min(round(rate * 3600), _MOST_HOURLY) for _, rate in most),
        )

    def _decayed(self, key: ExpertKey, now: float) -> float:
        rows, then = self._rows.get(key, (0.0, now))
        return rows * math.exp((then - now) / MEMORY)
