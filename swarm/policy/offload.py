"""Whether an expert that is not in the accelerator's memory is waited for, or computed by the processor meanwhile.

Pure. Uploads share one link and the processor computes one expert after the other, so a call's misses take as long as
the slower of the two; dividing them so that both end together is the best there is. Either way the result is the
model's: this chooses where, not what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

_SMOOTHING: Final = 0.1
_MANY: Final = 8  # rows from which on reading the weights is not what takes the time


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, measured; 0: not known yet, and assumed to be nothing, so that it becomes known."""

    upload: float = 0.0  # of one expert
    few: float = 0.0  # the processor's for one expert with a few rows
    row: float = 0.0  # the processor's for each row, where there are many

    def on_processor(self, rows: int) -> float:
        """Of one expert with so many rows. Without a measurement of many, no more than the rows one by one."""
        if rows < _MANY:
            return self.few
        if self.row:
            return max(self.few, self.row * rows)
        return self.few * rows or inf

    def measured(self, rows: int, seconds: float) -> Costs:
        """With one more measurement of the processor."""
        if rows < _MANY:
            return replace(self, few=_smoothed(self.few, seconds))
        return replace(self, row=_smoothed(self.row, seconds / rows))


def uploads_to_await(rows: Sequence[int], costs: Costs, most: int) -> int:
    """How many of the missing experts, from the first, to wait for; the processor computes the others.

    `rows` are those of each missing expert, in the order of the uploads, of which no more than `most` are possible.
    Where it makes no difference, more are waited for: what is in the accelerator's memory is likely used again.
    """
    best, chosen = inf, 0
    for count in range(min(most, len(rows)) + 1):
        seconds = max(count * costs.upload, sum(costs.on_processor(number) for number in rows[count:]))
        if seconds <= best:
            best, chosen = seconds, count
    return chosen


def _smoothed(known: float, measured: float) -> float:
    return known + (_SMOOTHING if known else 1.0) * (measured - known)
