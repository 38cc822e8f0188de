"""What an engine has done so far: for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from moehive.swarm.telemetry.histogram import Histogram

from .events import Usage


@dataclass(slots=True)
class EngineCounts:
    """Counted on the event loop."""

    ended: Counter[str] = field(default_factory=Counter)  # generations, by how: stop, length, halted, failed
    refused: int = 0  # requests that found too many waiting
    prompt_tokens: int = 0  # cached ones among them
    cached_tokens: int = 0
    completion_tokens: int = 0
    first: Histogram = field(default_factory=Histogram)  # seconds from a request's arrival to its first text
    whole: Histogram = field(default_factory=Histogram)  # to its end, where it was not halted

    def used(self, usage: Usage) -> None:
        """Count the tokens of a generation."""
        self.prompt_tokens += usage.prompt
        self.cached_tokens += usage.cached
        self.completion_tokens += usage.completion
