"""Routing that was recorded, as the calls of one layer: for each forward pass, the experts of each of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load

DEMO = Path(__file__).parents[1] / "data" / "demo_routing.safetensors"

Call = list[frozenset[int]]  # the experts of each token


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """One layer: all sessions after each other, and where each begins among the calls."""

    calls: list[Call]
    sessions: list[int]

    def session(self, number: int) -> list[Call]:
        """The calls of one session."""
        end = self.sessions[number + 1] if number + 1 < len(self.sessions) else len(self.calls)
        return self.calls[self.sessions[number] : end]


def recorded_layers(path: Path) -> list[LayerTrace]:
    """The layers of a file of `moehive.swarm.trace`, in their order."""
    arrays = load(path.read_bytes())
    sizes, experts = arrays["tokens"].tolist(), arrays["experts"].tolist()  # [C], [N][L][K]
    sessions = [call for call, begins in enumerate(arrays["starts"].tolist()) if begins]
    layers = []
    for layer in range(len(experts[0])):
        rows = iter(experts)
        calls = [[frozenset(next(rows)[layer]) for _ in range(size)] for size in sizes]
        layers.append(LayerTrace(calls, sessions))
    return layers
