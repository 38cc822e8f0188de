"""Where a node is in its life, and what may be asked of it: the daemon moves it on, HTTP and systemd are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from .coverage import Coverage
from .status import NodeStatus, Phase

_ORDER: Final = list(Phase)


@dataclass(frozen=True, slots=True)
class NodeView:
    """What can be asked of a node that has a model, on its event loop."""

    status: NodeStatus
    coverage: Callable[[], Coverage]


class NodeState:
    """`tell` hears of each phase as it begins. `view` is there from LOADING on; `http` is the address of the node's own
    HTTP server, where it has one.
    """

    def __init__(self, tell: Callable[[Phase], None] = lambda phase: None) -> None:
        self.phase = Phase.STARTING
        self.view: NodeView | None = None
        self.http: str | None = None
        self._tell = tell
        tell(self.phase)

    def enter(self, phase: Phase) -> None:
        """Begin a phase. A node never goes back: one that is leaving does not become ready any more."""
        if _ORDER.index(phase) > _ORDER.index(self.phase):
            self.phase = phase
            self._tell(phase)
