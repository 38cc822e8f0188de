"""What a running node says about itself to its own machine: facts, and one small JSON file of them every second.

A file, beside what is told over HTTP: it needs nobody who listens, cannot be flooded, and is there for scripts too.
Only this user can read it. It is replaced as a whole, and names the process, so that a file that a killed node has
left is known for what it is.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from moehive.protocol.ids import ModelId, PeerId
from moehive.swarm.log import get_logger
from moehive.swarm.store.ledger import Usage
from moehive.swarm.telemetry.histogram import Histogram
from moehive.swarm.telemetry.report import latency_json, tier_json
from moehive.swarm.tiers.stats import TierStats
from moehive.swarm.transfer.uploads import UploadFacts

from .scheduler import QueueFacts, QueueLimits

EVERY: Final = 1.0  # seconds between two files
VERSION: Final = 2  # 2: `phase`, `http`
MAX_BYTES: Final = 4 << 20  # of a file that is read: thousands of layers would fit
_SAME_START: Final = 1.0  # seconds by which the start of one process may be told differently
_log = get_logger(__name__)


class Phase(enum.StrEnum):
    """Of a node's life, in this order."""

    STARTING = "starting"  # joins the swarm and opens the model
    LOADING = "loading"  # gets and verifies what it is to hold
    READY = "ready"
    LEAVING = "leaving"  # finishes what was begun


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node at one moment."""

    model: ModelId
    model_name: str
    held: int  # experts
    experts: int  # of the whole model
    tier: TierStats
    queue: QueueFacts
    requests: int  # answered since the start
    rows: int
    latencies: Histogram  # of requests, from arrival to answer
    uploads: UploadFacts
    received: int  # bytes of objects
    sending: Mapping[PeerId, float]  # who sends objects to us now: bytes per second
    peers: int  # that announce the model
    stored: TierStats | None = None  # experts as they are stored, below `tier`
    device: str = "cpu"  # where experts are computed
    device_tier: TierStats | None = None  # in that device's memory
    batches: int = 0  # computed since the start; requests / batches: how many were computed together
    limits: QueueLimits = field(default_factory=QueueLimits)
    duplicate: int = 0  # bytes of objects that somebody else had sent before
    wrong: int = 0  # answers that did not match their hash
    disk: Usage | None = None  # the store; None where experts lie in a converted directory

    def to_json(self) -> dict[str, Any]:
        """Seconds and bytes."""
        return {
            "modelId": self.model,
            "modelName": self.model_name,
            "expertsHeld": self.held,
            "expertsTotal": self.experts,
            "device": self.device,
            "experts": tier_json(self.tier, "disk", self.device_tier, self.stored),
            "requests": {
                "waiting": self.queue.requests,
                "expectedWait": round(self.queue.expected_wait, 6),
                "done": self.requests,
                "rows": self.rows,
                "latency": latency_json(self.latencies.latencies),
            },
            "peers": {"known": self.peers, "asking": self.uploads.asking},
            "transfers": {
                "sentBytes": self.uploads.bytes_sent,
                "uploads": self.uploads.running,
                "uploadsWaiting": self.uploads.waiting,
                "uploadRate": self.uploads.rate,
                "receivedBytes": self.received,
                "downloading": {peer: round(rate) for peer, rate in self.sending.items()},
            },
            **({} if self.disk is None else {"disk": _disk_json(self.disk)}),
        }


def _disk_json(usage: Usage) -> dict[str, Any]:
    return {"budgetBytes": usage.budget_bytes, "usedBytes": usage.used_bytes, "objects": usage.objects}


class NodeStatus:
    """All that a node says of itself, as one JSON object. `http` is where else it says it."""

    def __init__(
        self,
        peer: PeerId,
        facts: Callable[[], NodeFacts],
        *,
        phase: Callable[[], Phase] = lambda: Phase.READY,
        http: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.peer = peer
        self.facts = facts
        self._phase = phase
        self._http = http
        self._clock = clock
        self._started = clock()
        self._process = {"pid": os.getpid(), "processStarted": psutil.Process().create_time()}

    def to_json(self) -> dict[str, Any]:
        """Now."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Now, as facts that cost little to take; what is returned makes JSON of them, in any thread."""
        times = {"started": round(self._started, 3), "updated": round(self._clock(), 3)}
        known = {"version": VERSION, "peer": self.peer, "phase": self._phase(), "http": self._http}
        facts = self.facts()
        return lambda: {**known, **self._process, **times, **facts.to_json()}


class StatusFile:
    """Writes `directory`/PEER.json. `run()` goes on until cancelled, and takes the file away."""

    def __init__(self, directory: Path, status: NodeStatus) -> None:
        self.path = directory / f"{status.peer}.json"
        self._status = status

    async def run(self) -> None:
        """Write for ever. A disk that refuses is logged once and tried again."""
        troubled = False
        try:
            while True:
                try:
                    await asyncio.to_thread(self._write, self._status.snapshot())
                    troubled = False
                except OSError as error:
                    if not troubled:
                        _log.warning("the status file cannot be written", file=str(self.path), reason=str(error))
                    troubled = True
                await asyncio.sleep(EVERY)
        finally:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _write(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(snapshot()).encode())
        temporary.replace(self.path)  # a reader sees one or the other; nothing has to outlive a crash


def read_statuses(directory: Path) -> Iterator[Mapping[str, Any]]:
    """What the nodes that run now said last. Files of dead processes, and what is no status, are passed over."""
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        status = _read(path)
        if status is not None and _is_running(status):
            yield status


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            status = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError):  # it is gone, or somebody else's
        return None
    return status if isinstance(status, dict) and status.get("version") == VERSION else None


def _is_running(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote it lives: not another one that has its number now."""
    try:
        started = psutil.Process(int(status["pid"])).create_time()
        return abs(started - float(status["processStarted"])) < _SAME_START
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
